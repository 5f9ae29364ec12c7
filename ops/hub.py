"""Whether weights can be had from Hugging Face's hub, told in seconds; its own client tries again for minutes."""

import threading
from pathlib import Path

WAIT_S = 20.0
FORMS = "open_clip:MODEL/TAG, open_clip:MODEL@FILE, timm:NAME, timm:NAME@FILE, pixels:SIZE, module:FILE.py:FACTORY"


def check_hub_answers(repository: str) -> None:
    """Do nothing if a repository's files lie on this machine or the hub answers.

    Parameters
    ----------
    repository : str
        OWNER/NAME, perhaps with a file behind it; empty for weights that lie elsewhere, of which nothing is known.

    Raises
    ------
    ValueError
        Within `WAIT_S`, otherwise: one line that names the other forms of encoders.
    """
    from huggingface_hub import constants, utils

    name = "/".join(repository.split("/")[:2])
    cached = Path(constants.HF_HUB_CACHE, "models--" + name.replace("/", "--"), "snapshots")
    if not name or (cached.is_dir() and any(cached.iterdir())):
        return
    problems: list[str] = []

    def ask() -> None:
        try:
            utils.get_session().head(constants.ENDPOINT, timeout=WAIT_S / 2)
        except Exception as error:  # httpx's errors, huggingface_hub's of offline mode; all are told
            problems.append(f"{type(error).__name__}: {error}".splitlines()[0])

    asking = threading.Thread(target=ask, daemon=True)  # a look-up of a name may hang longer than any timeout
    asking.start()
    asking.join(WAIT_S)
    if asking.is_alive() or problems:
        why = problems[0] if problems else f"no answer in {WAIT_S:.0f} s"
        raise ValueError(
            f"the weights are not on this machine, and {constants.ENDPOINT} cannot be reached ({why}); "
            f"give a file of weights or another encoder: {FORMS}"
        )
