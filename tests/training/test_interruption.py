import os
import signal

import pytest

from worldloom.training.interruption import SIGNALS, Interrupted, Interruption


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
