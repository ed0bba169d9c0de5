"""Settings that name a network for classes: one to build, or one that was trained before."""

from typing import Any, Literal

from pydantic import Field, model_validator

from stillhouse.data_settings import FROM_SETTING
from stillhouse.spec import Count, Settings

IMAGE_NETWORKS = ("convnet", "resnet18", "vit")
"""Built-in networks that read images alone."""


class NetworkSettings(Settings):
    """A network for images, vectors or texts."""

    name: Literal["convnet", "resnet18", "vit", "linear", "mlp", "language_model", "factory"] = (
        Field(
            default="convnet",
            description="convnet, resnet18 and vit read images; linear and mlp vectors, and the "
            "pixels of images; language_model texts; `package.module:function` is short for "
            "`factory`",
        )
    )
    depth: Count = Field(
        default=3,
        description="convnet: blocks, each halves the image; vit: blocks; mlp: hidden layers",
    )
    width: Count | None = Field(
        default=None, description="channels; convnet and mlp 128, resnet18 and vit 64"
    )
    norm: Literal["instance", "batch", "none"] | None = Field(
        default=None, description="convnet instance, resnet18 batch"
    )
    factory: str | None = Field(
        default=None,
        pattern=r"^[\w.]+:\w+$",
        description="`package.module:function`, called with num_channels and image_size, or "
        "num_features, of vectors; num_classes and `options`; gives a torch.nn.Module",
    )
    options: dict[str, Any] = Field(
        default={},
        description="keyword arguments of the factory; vit: `patch` 4, `heads` 4",
    )
    path: str | None = Field(
        default=None,
        description="of a language_model: a causal one that transformers loads, and its tokenizer",
    )
    from_: str | None = Field(default=None, alias="from", description=FROM_SETTING)
    frozen: bool = Field(
        default=False, description="language_model: only the classifier layer is trained"
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, section: Any) -> Any:
        if isinstance(section, dict) and ":" in str(section.get("name")):
            return section | {"name": "factory", "factory": section["name"]}
        return section

    @model_validator(mode="after")
    def _fits(self) -> "NetworkSettings":
        if (self.name == "factory") != (self.factory is not None):
            raise ValueError("`factory` goes with `name: factory`, and only with it")
        given = (self.path, self.from_).count(None) == 1
        if given != (self.name == "language_model"):
            raise ValueError("`path` or `from`, one of them, goes with `name: language_model`")
        unread = {
            "convnet": {"options", "frozen"},
            "resnet18": {"options", "depth", "frozen"},
            "vit": {"norm", "frozen"},
            "linear": {"depth", "width", "norm", "options", "frozen"},
            "mlp": {"norm", "options", "frozen"},
            "language_model": {"depth", "width", "norm", "options"},
            "factory": {"depth", "width", "norm", "frozen"},
        }[self.name]
        unknown = sorted(self.options.keys() - {"patch", "heads"}) if self.name == "vit" else []
        if unknown:
            raise ValueError(f"`options.{unknown[0]}`: a vit has `patch` and `heads`")
        for key in sorted(unread):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"`{key}` does nothing for `name: {self.name}`: leave it out")
        return self

    def identity(self) -> dict[str, Any]:
        """All keys; those of language models where they are set."""
        later = {"path", "from_", "frozen"}
        made = self.model_dump(mode="json")
        return {key: value for key, value in made.items() if key not in later or value}

    @property
    def batch_norm(self) -> bool:
        """Whether it has batch norm; False for a factory, which is not called here."""
        default = "batch" if self.name == "resnet18" else "instance"
        return self.factory is None and (self.norm or default) == "batch"

    @property
    def label(self) -> str:
        """A name that differs between different networks, such as `convnet-3, width 32`."""
        if self.factory is not None:
            options = [f"{name} {value}" for name, value in sorted(self.options.items())]
            return ", ".join([self.factory, *options])
        has_depth = self.name in ("convnet", "vit", "mlp")
        base = f"{self.name}-{self.depth}" if has_depth else self.name
        base += "".join(f", {name} {value}" for name, value in sorted(self.options.items()))
        width = f", width {self.width}" if self.width else ""
        norm = {None: "", "none": ", no norm"}.get(self.norm, f", {self.norm} norm")
        return base + width + norm


class GivenClassifier(Settings):
    """A classifier that exists."""

    path: str | None = Field(
        default=None,
        description="a folder that `task: classify` made; or a state dict in safetensors, whose "
        "`network` is given too",
    )
    from_: str | None = Field(default=None, alias="from", description=FROM_SETTING)
    network: NetworkSettings | None = Field(default=None, description="of a state dict alone")

    @model_validator(mode="after")
    def _one_of(self) -> "GivenClassifier":
        if (self.path is None) == (self.from_ is None):
            raise ValueError("give either `path` or `from`")
        state_dict = self.path is not None and self.path.endswith(".safetensors")
        if state_dict != (self.network is not None):
            raise ValueError("`network` goes with a `path` to a state dict (*.safetensors)")
        return self

    @property
    def label(self) -> str:
        """A name for people."""
        return "a given classifier" if self.network is None else self.network.label
