"""Teachers that exist: classifiers which `task: classify` or somebody else trained."""

from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from stillhouse.classification.stored import check_answers, load_teacher
from stillhouse.classification.task import StoredClassifier
from stillhouse.distillation.prepared import ImageHost, ImageTask, Teacher, require_batch_norm
from stillhouse.storage.artifact import Store
from stillhouse.storage.task import Output, Place

_CHECKED = 256
"""Images of which the logits are looked at."""


@dataclass(frozen=True, slots=True)
class GivenTeacher:
    """A classifier by its content; `key` is its place in the spec, for messages."""

    classifier: StoredClassifier
    key: Place[str]

    @property
    def weights(self) -> str:
        """What identifies it."""
        return self.classifier.digest

    def uri(self, store: Store) -> str:
        """Where it lies."""
        return self.classifier.uri

    def load(self, host: ImageHost) -> nn.Module:
        """The classifier on the device; it reads the job's images and answers to its classes.

        Raises:
            InputError, ArtifactError: as `load_teacher`. ModelError: it has no batch norm.
        """
        prepared = host.prepared
        teacher = load_teacher(self.classifier, prepared, self.key)
        require_batch_norm(teacher, f"`{self.key}`")
        return teacher.to(prepared.device)


AnyTeacher: TypeAlias = Teacher | GivenTeacher


@dataclass(frozen=True)
class GivenTeacherTask(ImageTask):
    """Checks that a given teacher fits the job's images, before anything is made with it."""

    teacher: GivenTeacher

    def make(self, host: ImageHost) -> Output:
        """Nothing; InputError where an answer is not finite, and as `GivenTeacher.load`."""
        images = host.prepared.train[:_CHECKED]
        check_answers(host.teacher(self.teacher), images, self.teacher.key)
        return Output(counts={"images": len(images)})
