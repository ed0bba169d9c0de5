"""What a distil job reads from outside its store: images, given experts, code of networks."""

from dataclasses import dataclass
from typing import Any

from stillhouse.distillation.image_files import list_source
from stillhouse.distillation.image_sources import ImageData
from stillhouse.distillation.own_networks import own_networks
from stillhouse.distillation.spec import DistillSpec
from stillhouse.errors import ArtifactError
from stillhouse.fingerprint import fingerprint
from stillhouse.storage.artifact import Store, load_manifest
from stillhouse.storage.digests import digest_files
from stillhouse.storage.filesystem import FileInfo, absolute_uri

IMAGES_VERSION = 3


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """A source of images known by content, and given experts by their manifests.

    Attributes:
        images: name of the images artifact that it becomes.
        experts: URI and identity of each given trajectory.
        code: digests of the user's own networks.
    """

    images: str
    experts: tuple[tuple[str, str], ...]
    code: tuple[str, ...] = ()

    def identity(self) -> list[Any]:
        """As JSON values."""
        return [self.images, [name for _, name in self.experts], *self.code]


def list_images(data: ImageData) -> list[FileInfo]:
    """The files of a source; none for a data set that ships with a library.

    Raises:
        InputError: nothing matches. SpecError: files of arrays, which are not read.
    """
    if data.path is None:
        return []
    files = list_source(data.path)
    return files + (list_source(data.test) if isinstance(data.test, str) else [])


def open_images(
    store: Store, spec: DistillSpec, files: list[FileInfo], *, remember: bool
) -> ImageInputs:
    """Digest the files and look at given experts.

    Raises:
        ArtifactError: a given expert is not there, or was trained on other kinds of pixels.
        BadFileError: a file vanished. SpecError: a network's code is not here.
    """
    digests = [d.sha256 for d in digest_files(store, files, remember=remember)] if files else []
    asked = spec.data.model_dump(mode="json", exclude={"path"})
    if isinstance(spec.data.test, str):
        asked.pop("test")
    names = [file.name for file in files]
    images = fingerprint(["images", IMAGES_VERSION, asked, names, digests])
    given = spec.experts.path if spec.experts is not None else None
    zca = spec.preprocessing.zca
    experts = [(absolute_uri(uri), _expert_identity(absolute_uri(uri), zca)) for uri in given or []]
    code = tuple(own.digest for own in own_networks(spec))
    return ImageInputs(images, tuple(experts), code)


def _expert_identity(uri: str, zca: bool) -> str:
    """Its fingerprint; experts of whitened images teach nothing about others, and say nothing."""
    found = load_manifest(uri, "trajectories")
    if found.settings.get("zca", zca) != zca:
        raise ArtifactError(
            f"{uri} was trained with `preprocessing.zca: {str(not zca).lower()}`, this job has "
            f"{str(zca).lower()}: give the experts' own, or train new ones"
        )
    return found.fingerprint
