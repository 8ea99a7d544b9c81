"""The fixtures that other tests trust."""

import os
import pathlib
import socket

import pytest


def test_a_connection_to_elsewhere_is_refused():
    with socket.socket() as connection:
        connection.settimeout(1)
        with pytest.raises(ConnectionError, match="tests use no network"):
            connection.connect(("192.0.2.1", 80))
        with pytest.raises(ConnectionError, match="tests use no network"):
            connection.connect_ex(("192.0.2.1", 80))
    with pytest.raises(ConnectionError, match="tests use no network"):
        socket.getaddrinfo("example.org", 80)
    with pytest.raises(ConnectionError, match="tests use no network"):
        socket.create_connection(("example.org", 80), timeout=1)


def test_a_connection_to_this_machine_works():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname(), timeout=5) as connection:
            assert connection.getpeername() == server.getsockname()


def test_code_runs_with_the_devices_asked_for(run_with_devices):
    printed = run_with_devices(3, "import jax; print(jax.device_count())")
    assert printed.split() == ["3"]


def test_code_that_fails_in_the_child_fails_here(run_with_devices):
    with pytest.raises(pytest.fail.Exception, match="exit code 1 with 2 devices"):
        run_with_devices(2, "assert False, 'as it should'")


@pytest.mark.data
def test_the_data_directory_holds_checkpoints(data_dir):
    assert list(data_dir.glob("models/*/config.json"))


def test_children_find_the_checkout():
    root = pathlib.Path(__file__).resolve().parent.parent
    assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == str(root)
