"""A Ctrl-C that is held back comes at the end of the block, or where the block waits."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from rpcpipe.transport.interrupts import allow_interrupts, shield_interrupts

pytestmark = pytest.mark.alone


def test_a_signal_in_the_block_takes_effect_at_its_end() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with shield_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("the whole block")
        done.append("not reached")
    assert done == ["the whole block"]
    with shield_interrupts(), shield_interrupts():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_nests_and_survives_an_error() -> None:
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012, SIM117
        with shield_interrupts():
            with shield_interrupts():
                os.kill(os.getpid(), signal.SIGINT)
            raise ValueError("the error is its context")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_waits_are_interrupted_and_what_was_held_back_is_checked() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012, SIM117
        with shield_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("work")
            with allow_interrupts():
                done.append("not reached")
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012, SIM117
        with shield_interrupts():
            with allow_interrupts():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            done.append("not reached")
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012, SIM117
        with shield_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            shield_interrupts.check()
            done.append("not reached")
    with shield_interrupts():
        shield_interrupts.check()
        with allow_interrupts():
            done.append("nothing was held back")
    assert done == ["work", "nothing was held back"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_off_the_main_thread_it_does_nothing() -> None:
    found = []

    def elsewhere() -> None:
        with shield_interrupts():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
