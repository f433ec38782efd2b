"""The old name of `jpeft.text.conversations`."""

from jpeft.text.conversations import *  # noqa: F403
