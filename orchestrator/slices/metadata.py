"""What Google's metadata server says of the machine that asks: that it is about to be taken away, or nothing.

Source: cloud.google.com/compute/docs/metadata/predefined-metadata-keys, `instance/`.
"""

import urllib.error
import urllib.request

HOST = "metadata.google.internal"  # unless GCE_METADATA_HOST names another, as for Google's own libraries
ASK_EVERY_S = 1.0  # a spot machine has 30 s
RETRY_S = 30.0  # after no answer
TIMEOUT_S = 5.0
STAYS = {"preempted": "FALSE", "maintenance-event": "NONE"}  # by key, what it says as long as the machine stays


def notice(host: str) -> str | None:
    """Raises OSError where no metadata server answers."""
    for key, stays in STAYS.items():
        said = value_of(host, key)
        if said not in (stays, None):
            return f"metadata server: {key} {said}"
    return None


def value_of(host: str, key: str) -> str | None:
    """None where the server does not know this key."""
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/{key}", headers={"Metadata-Flavor": "Google"}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on the machine's own link
    try:
        with direct.open(request, timeout=TIMEOUT_S) as answer:
            return str(answer.read(100).decode(errors="replace")).strip()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
