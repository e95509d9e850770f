import os
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from worldloom.starting import SIGNALS
from worldloom.training.interruption import Interrupted, Interruption, Limits, Paused


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_the_next_check(number, capfd):
    interruption = Interruption()
    before = signal.getsignal(number)
    with interruption.listening():
        interruption.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted) as stopped:
            interruption.check()
    assert stopped.value.exit_code == 128 + number and stopped.value.between
    assert f"{signal.Signals(number).name}: finishing the update" in capfd.readouterr().err
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_does_not_wait():
    interruption = Interruption()
    with interruption.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # some schedulers send it again and again
        with pytest.raises(Interrupted) as stopped:
            os.kill(os.getpid(), signal.SIGINT)
    assert not stopped.value.between


def test_a_limit_does_not_stop_the_thread_that_collects_during_an_update():
    limits, data = Limits(max_steps=3), SimpleNamespace(updates=3, complete=False)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(limits.check, data).result()
    with pytest.raises(Paused, match=r"trainer\.max_steps=3"):
        limits.check(data)
