"""Stand-ins for published methods are known to varkern as the published ones are; each has parity tests."""

from varkern import fingerprints


def publish(*functions):
    for function in functions:
        known = fingerprints.fingerprint(fingerprints.plain(function).__code__)
        fingerprints.KNOWN[known] = f"the stand-in {function.__qualname__}"
