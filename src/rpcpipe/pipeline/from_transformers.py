"""Make pipelines of transformers' models: GPT-2, BERT and Llama, cut between their layers.

The layers are transformers' classes; what its models do between layers (embeddings, masks, rotary angles, losses) is
done at the stage that needs it. A layer's name is its path in the unsplit model, so ``state_dict`` and saved weights
have transformers' names. ``model/hf`` has one file per family; a new family is a function from a config, or a model,
to a dict of layers.

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

    ``config_or_model``: a GPT2Config, BertConfig or LlamaConfig, whose layers are built with transformers' initial
    weights on their workers and never here; or a GPT2LMHeadModel, BertForPreTraining, BertForMaskedLM or
    LlamaForCausalLM, whose weights are used and which is not changed. A BertConfig means BertForPreTraining unless its
    ``architectures`` names BertForMaskedLM. ``stages``: the number of stages to cut the model into by parameters, one
    on each of the first workers; by default all workers are used. ``pipeline_arguments`` are Pipeline's; ``loss`` is
    the model's unless given; without ``optimizer`` the pipeline infers and evaluates.

    Inputs are a dict as the model's forward takes it: input_ids (batch, time) and optionally attention_mask,
    token_type_ids and position_ids, all (batch, time). Targets are a dict of the forward's label arguments: labels
    (batch, time), and for BertForPreTraining next_sentence_label (batch). Outputs are the logits, (batch, time,
    vocabulary), for BertForPreTraining a dict of prediction_logits and seq_relationship_logits.

    Raises DependencyError without the extra ``hf``, ArgumentError for another model or an option of it that a pipeline
    does not support, and whatever Pipeline raises.
    """
    try:
        from rpcpipe.model.hf.cut import cut
    except ImportError as error:
        raise DependencyError(
            f"rp.from_transformers needs transformers: pip install '.[hf]' in a checkout ({error})"
        ) from error
    source = config_or_model if hasattr(config_or_model, "config") else copy.deepcopy(config_or_model)
    layers, loss, language_model = cut(source)
    if stages is not None:
        require("balance" not in pipeline_arguments, "stages=… and balance=… say the same; pass one of them")
        pipeline_arguments["balance"] = balance_by_parameters(layers, stages)
    pipe = Pipeline(layers, cluster, **{"loss": loss, **pipeline_arguments})
    pipe.recipe.language_model = language_model
    return pipe
