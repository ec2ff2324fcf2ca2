"""Make pipelines of transformers' models, cut between their blocks, by one way for all of them.

The layers are transformers' modules; what its models do between layers (masks, rotary angles, losses) is done at the
stage that needs it. A layer's name is its path in the unsplit model, so ``state_dict`` and saved weights have
transformers' names. ``model/hf`` finds the layers of a model by running its forward without weights.

This needs the extra ``hf``; transformers is imported on the first use.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from rpcpipe.cluster.tenancy import PipelineCluster
from rpcpipe.errors import DependencyError, require
from rpcpipe.pipeline.pipeline import Pipeline
from rpcpipe.pipeline.planning import balance_by_parameters


def from_transformers(
    config_or_model: Any,
    cluster: PipelineCluster,
    *,
    stages: int | None = None,
    config: Any = None,
    **pipeline_arguments: Any,
) -> Pipeline:
    """Return a Pipeline of a transformers model on ``cluster``.

    ``config_or_model``: a config of transformers, whose layers are built with its initial weights on their workers and
    never here; a folder (str or Path) that ``save_pretrained`` has written, whose weights every worker reads for its
    own layers, in the dtype of the config; or a model, whose weights are used and which is not changed, also with
    peft's adapters in it; docs/guide/transformers-families.md lists the classes. The class of a config or folder is
    that of its ``architectures``; a config without them means a causal model, or for BERT BertForPreTraining.
    ``config``: stands for the one in the folder. ``stages``: the number of stages to cut the model into by parameters,
    one on each of the first workers; by default all workers are used. ``pipeline_arguments`` are Pipeline's; ``loss``
    is the model's unless given; without ``optimizer`` the pipeline infers and evaluates.

    Inputs are a dict of arguments of the model's forward: input_ids (batch, time) and what else it takes of
    attention_mask, token_type_ids and position_ids, all (batch, time). Targets are a dict of the forward's label
    arguments: labels, (batch, time) or (batch) for classes of sequences, and for BertForPreTraining
    next_sentence_label (batch). Outputs are the logits, (batch, time, vocabulary), or a dict of the model's outputs by
    name if they are several.

    Raises DependencyError without the extra ``hf``; ArgumentError or ModelError for a model, an option of it or an
    adapter that a pipeline does not support, and for a path that is no such folder; CheckpointError for a folder that
    holds another model than its config says; and whatever Pipeline raises.
    """
    try:
        from rpcpipe.model.hf.cut import cut
        from rpcpipe.model.hf.folder import Folder
    except ImportError as error:
        raise DependencyError(
            f"rp.from_transformers needs transformers: pip install '.[hf]' in a checkout ({error})"
        ) from error
    is_folder = isinstance(config_or_model, (str, os.PathLike))
    require(config is None or is_folder, "config=… is for a folder; a config or a model is passed by itself")
    if is_folder:
        source: Any = Folder.of(Path(config_or_model), config)
    else:
        source = config_or_model if hasattr(config_or_model, "config") else copy.deepcopy(config_or_model)
    layers, loss, language_model = cut(source)
    if stages is not None:
        require("balance" not in pipeline_arguments, "stages=… and balance=… say the same; pass one of them")
        pipeline_arguments["balance"] = balance_by_parameters(layers, stages)
    pipe = Pipeline(layers, cluster, **{"loss": loss, **pipeline_arguments})
    pipe.recipe.language_model = language_model
    return pipe
