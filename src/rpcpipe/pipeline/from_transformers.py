"""Make pipelines of transformers' models, cut between their blocks, by one way for all of them.

The layers are transformers' modules; what its models do between layers (masks, rotary angles, losses) is done at the
stage that needs it. A layer's name is its path in the unsplit model, so ``state_dict`` and saved weights have
transformers' names. ``model/hf`` finds the layers of a model by running its forward without weights.

This needs the extra ``hf``; transformers is imported on the first use.
"""

from __future__ import annotations

import copy
from typing import Any

from rpcpipe.cluster.tenancy import PipelineCluster
from rpcpipe.errors import DependencyError, require
from rpcpipe.pipeline.pipeline import Pipeline
from rpcpipe.pipeline.planning import balance_by_parameters


def from_transformers(
    config_or_model: Any, cluster: PipelineCluster, *, stages: int | None = None, **pipeline_arguments: Any
) -> Pipeline:
    """Return a Pipeline of a transformers model on ``cluster``.

    ``config_or_model``: a config, whose layers are built with transformers' initial weights on their workers and never
    here, of the class that its ``architectures`` names first, or else of its type's causal model (BertForPreTraining of
    a BertConfig); or a model, whose weights are used and which is not changed. docs/guide/transformers-families.md
    lists the classes. ``stages``: the number of stages to cut the model into by parameters, one
    on each of the first workers; by default all workers are used. ``pipeline_arguments`` are Pipeline's; ``loss`` is
    the model's unless given; without ``optimizer`` the pipeline infers and evaluates.

    Inputs are a dict of arguments of the model's forward: input_ids (batch, time) and what else it takes of
    attention_mask, token_type_ids and position_ids, all (batch, time). Targets are a dict of the forward's label
    arguments: labels, (batch, time) or (batch) for classes of sequences, and for BertForPreTraining
    next_sentence_label (batch). Outputs are the logits, (batch, time, vocabulary), or a dict of the model's outputs by
    name if they are several.

    Raises DependencyError without the extra ``hf``, ArgumentError for another object, ModelError for a model that is no
    chain of blocks, which says why, and whatever Pipeline raises.
    """
    try:
        from rpcpipe.model.hf.cut import cut
    except ImportError as error:
        raise DependencyError(
            f"rp.from_transformers needs transformers: pip install 'rpcpipe[hf]' ({error})"
        ) from error
    source = config_or_model if hasattr(config_or_model, "config") else copy.deepcopy(config_or_model)
    layers, loss = cut(source)
    if stages is not None:
        require("balance" not in pipeline_arguments, "stages=… and balance=… say the same; pass one of them")
        pipeline_arguments["balance"] = balance_by_parameters(layers, stages)
    return Pipeline(layers, cluster, **{"loss": loss, **pipeline_arguments})
