"""The errors a user can cause, and can mend.

Every one of them is a `ValueError` whose message has the form
`<what failed>: <which object>: <found>, expected <wanted>. <one action>.`
The command line prints the message as one line and exits with code 2.
"""

__all__ = [
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "ShardingError",
    "UserError",
]


class UserError(ValueError):
    """A mistake in what was asked for; the message says what to do."""


class ConfigError(UserError):
    """A value in a configuration, a method string or a flag is wrong."""


class CheckpointError(UserError):
    """A checkpoint or a tokenizer cannot be read, or does not fit the model."""


class CapacityError(UserError):
    """A prompt, a token id or a batch exceeds what the model or memory holds."""


class ShardingError(UserError):
    """A mesh does not divide the arrays that it should hold."""
