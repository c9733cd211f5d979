import keras
import keras_hub

from keras_mamba2.models.mamba2_backbone import Mamba2Backbone


@keras.saving.register_keras_serializable(package="keras_mamba2")
class Mamba2CausalLM(keras_hub.models.CausalLM):
    backbone_cls = Mamba2Backbone

    def __init__(self, backbone, preprocessor=None, **kwargs):
        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor

        # === Functional Model ===
        inputs = backbone.input
        outputs = backbone.token_embedding(backbone(inputs), reverse=True)
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)
