"""Everything that fuseport raises about a user's input.

    FuseportError
    ├── SourceError                the source cannot be read
    │   ├── UnsafeSourceError      it asks for code to run, or for a file outside its directory
    │   └── CorruptSourceError     truncated, overlapping or missing bytes
    ├── ModelError                 the tensors and the facts do not fit together
    │   ├── MissingTensorError
    │   ├── UnknownTensorError
    │   ├── ShapeError
    │   ├── ScaleError
    │   └── UnsupportedOptionError
    ├── RecipeError                the choice of target, parallel sizes or dtypes cannot work
    ├── OutputError                the destination exists, is full, or is not writable
    ├── MissingPackageError        an option needs a package that is not installed
    ├── RankError                  another process of the same run failed, died or hangs
    └── VerificationError          a result is not what its source says it should be

Every message names the tensor or the option, what was expected, what was found and what to do.
"""


class FuseportError(Exception):
    """Base of every error about a source, a model, a recipe or an output.

    Its text is one paragraph: names of tensors and files may hold anything, also what moves a
    terminal's cursor.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


class FuseportWarning(UserWarning):
    """What a caller should know about a result that is as it was asked for."""


class SourceError(FuseportError):
    """A source cannot be read."""


class UnsafeSourceError(SourceError):
    """A source asks for code to be run, or for a file outside its own directory."""


class CorruptSourceError(SourceError):
    """A source's bytes are missing, truncated, overlapping or of an absurd size."""


class ModelError(FuseportError):
    """The source's tensors and the model's facts do not fit together."""


class MissingTensorError(ModelError):
    """A tensor that the model's facts call for is not in the source."""


class UnknownTensorError(ModelError):
    """A source tensor is neither used nor named as ignored."""


class ShapeError(ModelError):
    """A source tensor has another shape than the model's facts say."""


class ScaleError(ModelError):
    """A quantisation scale is missing, ambiguous, or not a finite, normal and positive number."""


class UnsupportedOptionError(ModelError):
    """The model uses an option that changes the meaning of its weights and is not handled."""


class RecipeError(FuseportError):
    """The chosen target, parallel sizes, dtype or quantisation cannot work for this model."""


class OutputError(FuseportError):
    """The destination exists, is full or cannot be written."""


class MissingPackageError(FuseportError):
    """An option needs a package that is not installed, or another version of it."""


class RankError(FuseportError):
    """Another process of the same conversion failed, died, hangs or has another plan."""


class VerificationError(FuseportError):
    """A result differs from what its manifest, its target or its source says."""
