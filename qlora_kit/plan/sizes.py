"""The sizes of a model's weights and of its adapter, found without loading either."""

from transformers import PretrainedConfig

from qlora_kit.lora import lora_layers
from qlora_kit.plan.fake import add_adapter, as_loaded, dense_model, quiet
from qlora_kit.plan.recall import RecallingMode
from qlora_kit.plan.workload import Workload


def weight_bytes(config: PretrainedConfig, work: Workload) -> int:
    """What the base's weights alone take, with the constants of those that are quantised: the least of any step.

    Args:
        config: of the model.
        work: whose quantisation and dtype are meant.
    """
    with quiet(), RecallingMode():
        model = as_loaded(dense_model(config, work), work)
        return sum(tensor.untyped_storage().nbytes() for tensor in (*model.parameters(), *model.buffers()))


def adapter_size(config: PretrainedConfig, work: Workload) -> tuple[int, list[int]]:
    """What the adapter of a workload is made of, by the injection of the run itself.

    Args:
        config: of the model.
        work: whose `lora` is meant.

    Returns:
        The parameters that train, and of each layer that gets an update its smaller width, above which no rank helps.
    """
    assert work.lora is not None
    with quiet(), RecallingMode():
        model = dense_model(config, work).requires_grad_(False)
        report = add_adapter(model, work.lora.model_copy(update={"init": "default"}))  # a start that takes any rank
        return report.trainable, [min(layer.shape[-2:]) for _, layer in lora_layers(model)]
