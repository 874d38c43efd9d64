"""`python -m hf_finetune.hub.upload`: the process that talks to the Hub; an `Order` on stdin, `Answer`s on stdout.

A process of its own, because nothing else bounds an upload: huggingface_hub (2.4) has requests without a time limit,
and joins its threads when Python ends. It ends by force at its deadline, and when whoever started it is gone. The token
is a matter for huggingface_hub alone: from HF_TOKEN or the login store.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any, NoReturn

from huggingface_hub import HfApi, set_client_factory
from huggingface_hub.errors import HfHubHTTPError

from hf_finetune.hub import secrets, transport
from hf_finetune.hub.commit import Commit, RefusedError
from hf_finetune.hub.order import Answer, Order

SILENCE = 60.0
"""Seconds without a byte after which a request is given up and tried again."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0
"""Seconds between two tries."""
AGAIN = {408, 409, 412, 425, 429}
"""Statuses that may be another one a moment later; so may every one from 500 on."""
HINTS = {
    401: "the token is missing, or not valid any more; set HF_TOKEN, or run hf auth login",
    403: "the token may not write to {repo}; take one that may, or give --as-pr for a pull request",
    404: "{repo} is not there, or the token may not see it; look at its name and the token's rights",
}


class Uploading:
    """One order, tried until it is done, refused or late.

    Args:
        order: What to upload.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self.ends = time.monotonic() + order.timeout
        self.trouble = "the Hub does not answer"
        """The last thing that went wrong."""
        self.status = 0
        """Of the last failure that the Hub answered with."""
        self.longest_silence = min(SILENCE, max(1.0, order.timeout / 4))
        set_client_factory(self._client)
        self.lost = transport.lost()
        self.api = HfApi()

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.ends - time.monotonic()

    def watch(self) -> None:
        """End this process at the deadline, whatever it does then."""
        late = threading.Timer(self.left, self.give_up)
        late.daemon = True
        late.start()

    def give_up(self) -> NoReturn:
        """Say why, and end."""
        tell(Answer("failed", f"not done within {self.order.timeout:g} s: {self.trouble}"))
        os._exit(0)

    def run(self) -> Answer:
        """Try until it is done."""
        wait = FIRST_WAIT
        while True:
            try:
                return Commit(self.api, self.order).make()
            except RefusedError as error:
                return Answer("failed", secrets.hide(str(error)))
            except (HfHubHTTPError, self.lost, OSError, RuntimeError, ValueError) as error:
                cause = _cause(error)
                if not isinstance(cause, json.JSONDecodeError):
                    self.trouble = secrets.hide(_told(cause))
                if not self._may_pass(cause):
                    return Answer("failed", self._with_hint(cause))
                pause = max(wait, _asked_wait(cause))
                if pause >= self.left:
                    return Answer("failed", f"{self.trouble}; trying again is due in {pause:g} s, after the deadline")
            tell(Answer("again", f"{self.trouble}; trying again in {pause:g} s"))
            time.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT)

    def _status(self, error: BaseException) -> int:
        """What the Hub answered; 0 where it is not about an answer."""
        if isinstance(error, HfHubHTTPError):
            return error.response.status_code
        # huggingface_hub 2.4 reads the answer about a card as JSON before it looks at the status.
        return self.status if isinstance(error, json.JSONDecodeError) else 0

    def _may_pass(self, error: BaseException) -> bool:
        status = self._status(error)
        if status:
            return status in AGAIN or status >= 500
        # The storage client (hf_xet) has no errors of its own; a ValueError is about what was sent.
        return isinstance(error, (self.lost, ConnectionError, TimeoutError)) or type(error) is RuntimeError

    def _with_hint(self, error: BaseException) -> str:
        hint = HINTS.get(self._status(error), "").format(repo=self.order.repo)
        return f"{self.trouble}; {hint}" if hint else self.trouble

    def _client(self) -> Any:
        """huggingface_hub's client, with a time limit and an ear for what is answered."""
        from huggingface_hub.utils._http import default_client_factory

        client = default_client_factory()
        client.timeout = self.longest_silence
        client.event_hooks = {**client.event_hooks, "response": [self._heard]}
        return client

    def _heard(self, response: Any) -> None:
        """Note failures that the library tries again by itself; one that asks for too long a wait ends the upload.

        Raises:
            HfHubHTTPError: Waiting for so long would be in vain.
        """
        if response.status_code < 400:
            return
        self.status = response.status_code
        self.trouble = f"the Hub answered {response.status_code} {response.reason_phrase}"
        asked = _seconds(response.headers.get("Retry-After"))
        if asked and asked >= self.left:
            raise HfHubHTTPError(self.trouble, response=response)


def _cause(error: BaseException) -> BaseException:
    """huggingface_hub hides what happened in a thread behind a RuntimeError."""
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error


def _told(error: BaseException) -> str:
    if isinstance(error, HfHubHTTPError):
        said = f": {error.server_message}" if error.server_message else ""
        return f"the Hub answered {error.response.status_code} {error.response.reason_phrase}{said}"[:400]
    return f"{type(error).__name__}: {error}"[:400]


def _asked_wait(error: BaseException) -> float:
    """Seconds that the Hub asks to wait, and one more; 0 where it does not."""
    if not isinstance(error, HfHubHTTPError):
        return 0.0
    asked = _seconds(error.response.headers.get("Retry-After"))
    return asked + 1.0 if asked else 0.0


def _seconds(header: str | None) -> float:
    """`Retry-After` in seconds; as a date it counts as none."""
    return float(header) if header and header.isdecimal() else 0.0


def tell(answer: Answer) -> None:
    """Answer in one line."""
    sys.stdout.write(answer.line())
    sys.stdout.flush()


def _end_with_parent() -> None:
    """Whoever started this holds its stdin open; when it dies, so does this."""
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """Upload."""
    order = Order.read(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    uploading = Uploading(order)
    uploading.watch()
    tell(uploading.run())
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
