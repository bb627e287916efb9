"""The networks under timm's names: import this module, and timm knows them.

    import timm, megatron_ext.vision.timm_models
    model = timm.create_model("mambavision_tiny", num_classes=10)
    features = timm.create_model("mambavision_tiny", features_only=True)  # four, at strides 4, 8, 16 and 32

Needs `pip install megatron-ext[vision]`. There are no weights to download: `pretrained=True` is refused, and
`megatron_ext.vision.weights` reads a published file.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from megatron_ext.errors import ConfigError
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.network import Network
from megatron_ext.vision.presets import PRESETS

NAMES = {
    "mambavision_tiny": "mambavision-t",
    "mambavision_tiny2": "mambavision-t2",
    "mambavision_small": "mambavision-s",
    "mambavision_base": "mambavision-b",
    "mambavision_large": "mambavision-l",
    "mambavision_large2": "mambavision-l2",
    "mambavision_large3": "mambavision-l3",
    "mambavision_nano": "mambavision-nano",
}
RENAMED = {
    "num_classes": "classes",
    "in_chans": "image_channels",
    "drop_path_rate": "drop_path",
    "img_size": "resolution",
}


class TimmMambaVision(Network):
    """A network with what timm asks of one.

    Args:
        cfg: The network.
        options: timm's `num_classes`, `in_chans`, `img_size` and `drop_path_rate`, or fields of the network.
    """

    def __init__(self, cfg: MambaVision, **options: Any) -> None:
        own = {RENAMED.get(name, name): value for name, value in options.items()}
        known = {field.name for field in fields(MambaVision)}
        for name in own.keys() - known:
            raise ConfigError("a MambaVision network has no such option", got=name, legal=", ".join(sorted(known)))
        classes = own.pop("classes", cfg.classes)
        super().__init__(replace(cfg, **own, classes=max(1, classes)))
        self.num_classes, self.num_features = self.model.classes, self.model.channels(3)
        self.head_hidden_size = self.num_features
        self.feature_info = [
            {"num_chs": self.model.channels(index), "reduction": 4 * 2**index, "module": f"stages.{index}"}
            for index in range(4)
        ]
        if classes == 0:
            self.reset_classifier(0)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer, or none at all for 0 classes."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which layer a parameter belongs to, for layer-wise learning rates."""
        # What leads to a stage is a part of its first block.
        to_stages: list[Any] = [(rf"^downsamples\.{stage - 1}\.", (stage, 0)) for stage in (1, 2, 3)]
        finely = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), *to_stages]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else finely}

    def forward_intermediates(
        self, x: Tensor, indices: Any = None, norm: bool = False, stop_early: bool = False, output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:  # fmt: skip
        """Features of some stages, (b, c, h, w), and unless `intermediates_only` the last ones before them."""
        if output_fmt != "NCHW":
            raise ConfigError("features come in one order", got=output_fmt, legal="NCHW")
        taken, _ = feature_take_indices(4, indices)
        features = self.forward_features(x)
        chosen = [self.norm(features[i]) if norm and i == 3 else features[i] for i in taken]
        return chosen if intermediates_only else (features[-1], chosen)


def _create(name: str, pretrained: bool, **options: Any) -> nn.Module:
    if pretrained:
        where = "megatron_ext.vision.weights.load_published reads a file of published weights"
        raise ConfigError("there are no weights to download", got="pretrained=True", legal=where)
    cfg, feature = PRESETS[NAMES[name]], {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    return build_model_with_cfg(TimmMambaVision, name, False, model_cfg=cfg, feature_cfg=feature, **options)


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        return _create(name, pretrained, **options)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"The network {NAMES[name]}."
    return create


default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": PRESETS[preset].classes, "crop_pct": 1.0, "interpolation": "bicubic",
            "input_size": (3, PRESETS[preset].resolution, PRESETS[preset].resolution), "pool_size": None,
            "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "first_conv": "stem.0", "classifier": "head",
        }
        for name, preset in NAMES.items()
    }
)  # fmt: skip
for _name in NAMES:
    globals()[_name] = register_model(_entrypoint(_name))
