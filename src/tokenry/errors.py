"""The errors Tokenry raises on purpose.

Each is a `TokenryError` and the built-in error that fits, so both `except TokenryError` and
`except ValueError` work. A message says what was given, what is allowed and how to mend it.
"""


class TokenryError(Exception):
    """Base of every error that Tokenry raises on purpose."""


class MethodNotFound(TokenryError, LookupError):
    """No available method has this name."""


class BadMethod(TokenryError, TypeError):
    """A class registered as a method breaks the rules of `tokenry.methods.Method`."""


class BadParameter(TokenryError, ValueError):
    """A method or an option was given a value that it does not allow."""


class BudgetTooSmall(BadParameter):
    """A cache budget is below the fewest slots the policy can work with."""


class BadPrompt(TokenryError, ValueError):
    """A prompt is empty, malformed or of a kind that cannot be read."""


class PromptTooLong(BadPrompt):
    """A prompt and what is to follow it exceed the model's context."""


class UnsupportedModel(TokenryError, TypeError):
    """The model, or a part of it, is of a kind that the method cannot serve."""


class CacheMisuse(TokenryError, RuntimeError):
    """A key-value cache was used in a way that would give wrong results."""


class MissingTokenizer(TokenryError, FileNotFoundError):
    """A model folder holds no tokenizer."""


class ResourceError(TokenryError, ValueError):
    """A second model, table or router is missing or does not fit the model."""
