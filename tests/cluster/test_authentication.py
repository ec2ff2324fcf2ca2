from __future__ import annotations

import json

import pytest

from rpcpipe.cluster import authentication
from rpcpipe.cluster.authentication import AuthenticationError

SECRET = b"a secret of enough characters"
HELLO = {"rank": 1, "world_size": 3, "host": "h", "pid": 7, "gpus": 0, "versions": {"python": "3.11"}}


def test_both_sides_are_convinced() -> None:
    challenge = authentication.nonce()
    sent = authentication.answer(SECRET, challenge, HELLO)
    hello, proof = authentication.check_answer(SECRET, challenge, json.loads(json.dumps(sent)))
    assert hello == HELLO
    authentication.check_welcome(SECRET, challenge, sent, proof)


def test_another_secret_convinces_neither() -> None:
    challenge = authentication.nonce()
    sent = authentication.answer(b"another", challenge, HELLO)
    with pytest.raises(AuthenticationError, match="the secrets differ"):
        authentication.check_answer(SECRET, challenge, sent)
    sent = authentication.answer(SECRET, challenge, HELLO)
    _, proof = authentication.check_answer(SECRET, challenge, sent)
    with pytest.raises(AuthenticationError, match="does not know the secret"):
        authentication.check_welcome(b"another", challenge, sent, proof)


def test_nothing_can_be_replayed_reflected_or_altered() -> None:
    challenge = authentication.nonce()
    sent = authentication.answer(SECRET, challenge, HELLO)
    _, proof = authentication.check_answer(SECRET, challenge, sent)
    with pytest.raises(AuthenticationError):  # replayed at another challenge
        authentication.check_answer(SECRET, authentication.nonce(), sent)
    with pytest.raises(AuthenticationError):  # the worker's own proof sent back to it
        authentication.check_welcome(SECRET, challenge, sent, sent["proof"])
    with pytest.raises(AuthenticationError):  # an old welcome for a new hello
        authentication.check_welcome(SECRET, challenge, authentication.answer(SECRET, challenge, HELLO), proof)
    with pytest.raises(AuthenticationError):  # another rank under the same proof
        authentication.check_answer(SECRET, challenge, {**sent, "hello": {**HELLO, "rank": 2}})


@pytest.mark.parametrize(
    "payload",
    [None, 3, [], {}, {"nonce": 1, "hello": 2, "proof": 3}, {"nonce": "", "hello": {}, "proof": "ü"}, "x" * 99],
)
def test_whatever_else_is_refused(payload: object) -> None:
    with pytest.raises(AuthenticationError):
        authentication.check_answer(SECRET, authentication.nonce(), payload)


def test_a_hello_that_lacks_something_is_refused_though_its_proof_is_right() -> None:
    challenge = authentication.nonce()
    for hello in ({}, {**HELLO, "rank": "1"}, {**HELLO, "rank": True}):
        with pytest.raises(AuthenticationError, match="another version of rpcpipe"):
            authentication.check_answer(SECRET, challenge, authentication.answer(SECRET, challenge, hello))


def test_what_listens_must_be_a_driver() -> None:
    for challenge in (None, "short", 64, ["x" * 64]):
        with pytest.raises(AuthenticationError, match="no rpcpipe driver"):
            authentication.answer(SECRET, challenge, HELLO)


def test_versions_are_compared() -> None:
    mine = authentication.versions()
    assert authentication.version_complaint(mine, "there") is None
    complaint = authentication.version_complaint({**mine, "torch": "1.0"}, "hostb:5")
    assert complaint is not None
    assert complaint.startswith("hostb:5 has other versions: torch 1.0 there, 2.")
