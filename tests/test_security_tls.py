"""TLS: a runner behind it, and a server that nobody vouches for."""

from __future__ import annotations

import time

import pytest
import trustme
from pymongo import MongoClient
from pymongo.errors import PyMongoError

from streamjobs import (
    ConnectError,
    Queue,
    clients,
)
from streamjobs.embedded import Server


class Encrypted(Server):
    """A server that speaks TLS only."""

    authority = ""

    @property
    def uri(self) -> str:
        return f"mongodb://127.0.0.1:{self.port}/?tls=true&tlsCAFile={self.authority}"

    def _wait(self) -> None:
        deadline = time.monotonic() + 30
        with MongoClient(self.uri, serverSelectionTimeoutMS=200) as client:
            while True:
                try:
                    client.admin.command("hello")
                except PyMongoError:
                    if time.monotonic() > deadline:
                        raise
                else:
                    return


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    authority, other = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    other.cert_pem.write_to_path(folder / "other.pem")
    mine = authority.issue_cert("127.0.0.1")
    mine.private_key_pem.write_to_path(folder / "key.pem")
    mine.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    server = Encrypted(
        folder / "server",
        options=["--tls-cert-file", str(folder / "cert.pem"), "--tls-key-file", str(folder / "key.pem")],
    )
    if server.program.sort == "mongod":
        pytest.skip("its options have other names; the driver's side is the same")
    server.authority = str(folder / "ca.pem")
    server.start()
    yield server
    server.kill()


async def test_a_runner_works_over_tls(encrypted, seen):
    async with Queue(encrypted.uri, "app.jobs") as queue:
        queue.handler("mail")(lambda job: None)
        async with queue.running("w"):
            one = await queue.put("mail")
            await seen.wait("try", job=one.id, outcome="success")
            assert queue.sync.get(one.id).state == "success"


@pytest.mark.usefixtures("driver_litter")
async def test_a_server_that_another_authority_vouches_for_is_not_spoken_to(encrypted, monkeypatch, seen):
    monkeypatch.setattr(clients, "COMMAND_TIMEOUT", 1.0)
    queue = Queue(encrypted.uri.replace("ca.pem", "other.pem"), "app.jobs")
    queue.handler("mail")(lambda job: None)
    with pytest.raises(ConnectError, match="certificate verify failed"):
        async with queue.running("w"):
            pass
    await queue.close()
