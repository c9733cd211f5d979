from typing import Any

from keras_mamba2.conversion import read_peft_adapter
from keras_mamba2.conversion import write_peft_adapter
from keras_mamba2.models import lora
from keras_mamba2.models.residual_backbone import ResidualBackbone


class Adapters:
    """The part of `Mamba2CausalLM` that reads and writes LoRA adapters."""

    backbone: ResidualBackbone
    generate_function: Any

    def load_peft_adapter(self, preset) -> None:
        """Loads a LoRA adapter of the `peft` library for transformers' Mamba-2.

        It replaces the adapters that the model has. `backbone.merge_lora()` makes it part of the
        weights; to train it further, compile the model.

        Args:
            preset: the path of a folder with `adapter_config.json` and `adapter_model.safetensors`,
                or a handle `hf://user/name`.

        Raises:
            ValueError: before anything changes, for an adapter of another kind than LoRA, with
                weights that have no place in the model, or of another architecture or size, and
                for stacked blocks.
        """
        adapters = read_peft_adapter(
            lora.projections(self.backbone), self.backbone.get_config(), preset
        )
        lora.replace(self.backbone, {layer: (a.rank, a.alpha) for layer, a in adapters.items()})
        for layer, adapter in adapters.items():
            adapter.assign_to(layer)
        # Compiled programs contain the scale of the former adapters.
        self.generate_function = self.predict_function = None
        self.train_function = self.test_function = None

    def save_peft_adapter(self, path, base_model_name_or_path: str | None = None) -> None:
        """Writes the LoRA adapters for the `peft` library: `PeftModel.from_pretrained`.

        Args:
            path: a folder that does not exist yet, or is empty. It appears when it is complete.
            base_model_name_or_path: string, the model that is adapted, for `peft`'s `Auto` classes.

        Warns:
            UserWarning: if out_proj is adapted, which `peft` refuses for most families.

        Raises:
            ValueError: if LoRA is not enabled, and for a folder with files in it.
        """
        write_peft_adapter(
            lora.projections(self.backbone),
            self.backbone.get_config(),
            path,
            base_model_name_or_path,
        )
