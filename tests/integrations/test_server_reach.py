"""Who may use `isqtorch serve`: each sentence of SECURITY.md about addresses, names, web pages and the key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import MODEL, ROOT, Server, serving, start

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from isqtorch.app.server import Reach, api_key, bind, check_exposure  # noqa: E402  # needs the packages above
from isqtorch.app.server.reach import Refusal  # noqa: E402

KEY = "sk-a-key-of-this-test-0123456789"


class Bound:
    """Stands for a socket that is bound to an address, which a test must not really do."""

    def __init__(self, address: str) -> None:
        self.address = address

    def getsockname(self) -> tuple[str, int]:
        return self.address, 1234

    def __enter__(self) -> Bound:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def reach(address: str, host: str | None = None, names: tuple[str, ...] = (), key: str | None = None) -> Reach:
    bound: Any = Bound(address)
    return Reach(bound, address if host is None else host, names, key)


def status(rules: Reach, *headers: tuple[str, str]) -> int:
    """The HTTP status of a request with these headers; 200 if it is served."""
    try:
        rules.check([(name.lower().encode(), value.encode("latin-1")) for name, value in headers])
    except Refusal as refusal:
        return refusal.status
    return 200


# ---- the Host header -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "host", "expected"),
    [
        ("127.0.0.1", "127.0.0.1:1234", 200),
        ("127.0.0.1", "localhost", 200),
        ("127.0.0.1", "LocalHost.:1234", 200),
        ("127.0.0.1", "127.3.2.1:1", 200),  # the port may be that of a tunnel
        ("127.0.0.1", "[::1]:1234", 200),
        ("127.0.0.1", "[::ffff:127.0.0.1]", 200),
        ("127.0.0.2", "127.0.0.2", 200),
        ("::1", "[::1]:1234", 200),
        ("::1", "[0:0:0:0:0:0:0:1]", 200),
        ("192.168.1.5", "192.168.1.5:1234", 200),
        ("fe80::1%eth0", "[fe80::1]:1234", 200),
        ("0.0.0.0", "10.1.2.3:1234", 200),  # a page cannot choose an address, only a name
        ("::", "[2001:db8::1]:1234", 200),
        ("0.0.0.0", "localhost:1234", 200),
        *((bound, "page.example", 403) for bound in ("127.0.0.1", "127.0.0.2", "::1", "192.168.1.5", "0.0.0.0", "::")),
        ("127.0.0.1", "127.0.0.1.page.example", 403),
        ("127.0.0.1", "localhost.page.example", 403),
        ("127.0.0.1", "192.168.1.5", 403),
        ("192.168.1.5", "localhost", 403),
        ("192.168.1.5", "192.168.1.6", 403),
        ("127.0.0.1", "2130706433", 403),
        *(("127.0.0.1", host, 400) for host in ("", "[", "]", "[::1", "[::g]", "[127.0.0.1", "a b", "a@127.0.0.1")),
        *(("127.0.0.1", host, 400) for host in ("127.0.0.1:", "127.0.0.1:x", "127.0.0.1:99999", "127.0.0.1/x", "\xff")),
        *(("127.0.0.1", host, 400) for host in ("localhost, page.example", "127.0.0.1 page.example", "[localhost]")),
    ],
)
def test_names_and_addresses(bound: str, host: str, expected: int) -> None:
    assert status(reach(bound), ("Host", host)) == expected


def test_names_that_the_user_gives() -> None:
    rules = reach("192.168.1.5", "box.lan", ("models.example",))
    assert {status(rules, ("Host", host)) for host in ("box.lan:1234", "BOX.LAN.", "models.example")} == {200}
    assert {status(rules, ("Host", host)) for host in ("x.models.example", "example", "lan")} == {403}
    for wrong in ("", "*", "a:1", "http://a", "a b", "[::1]"):
        with pytest.raises(ValueError, match="--allow-host must be the name of a host"):
            reach("127.0.0.1", names=(wrong,))


def test_a_header_that_is_there_twice_is_refused() -> None:
    host = ("Host", "localhost")
    assert status(reach("127.0.0.1"), host, ("Host", "page.example")) == 400
    assert status(reach("127.0.0.1"), host, ("Origin", "http://localhost"), ("Origin", "http://page.example")) == 400
    assert status(reach("127.0.0.1"), ("Connection", "close")) == 400  # no Host at all


# ---- web pages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://localhost:1234", 200),
        ("https://LOCALHOST:1234", 200),  # behind a proxy
        ("http://localhost:4321", 403),  # another server on this machine
        ("http://127.0.0.1:1234", 403),
        ("http://page.example", 403),
        ("http://localhost:1234.page.example", 403),
        ("null", 403),
        ("", 403),
        ("http://[", 403),
    ],
)
def test_origins(origin: str, expected: int) -> None:
    assert status(reach("127.0.0.1"), ("Host", "localhost:1234"), ("Origin", origin)) == expected


@pytest.mark.parametrize(
    ("site", "expected"), [("none", 200), ("same-origin", 200), ("same-site", 403), ("cross-site", 403)]
)
def test_pages_that_send_no_origin(site: str, expected: int) -> None:
    assert status(reach("127.0.0.1"), ("Host", "localhost"), ("Sec-Fetch-Site", site)) == expected


# ---- addresses and the key -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["", " "])
def test_an_empty_host_is_refused(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    from isqtorch.cli import main

    with pytest.raises(ValueError, match="--host is empty"):
        bind(host, 0)
    assert main(["serve", "-m", str(MODEL), "--host", host, "--port", "0"]) == 1
    assert "0.0.0.0 for all of them" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["a\0b", "x" * 300, "none.invalid"])
def test_a_host_that_is_none(host: str) -> None:
    with pytest.raises(OSError, match="cannot listen on"):
        bind(host, 0)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.5", "2001:db8::1", "::ffff:10.0.0.1"])
def test_other_machines_need_a_key_or_a_word(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from isqtorch import app
    from isqtorch.cli import main

    with pytest.raises(ValueError, match=r"lets other machines use the server. Set an API key .* or add --insecure"):
        check_exposure(reach(address), insecure=False)
    check_exposure(reach(address), insecure=True)
    check_exposure(reach(address, key=KEY), insecure=False)

    monkeypatch.delenv("ISQTORCH_API_KEY", raising=False)
    monkeypatch.setattr(app.server, "bind", lambda host, port: Bound(host))
    assert main(["serve", "-m", str(MODEL), "--host", address]) == 1
    assert "--insecure" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["127.0.0.1", "127.255.0.3", "::1", "::ffff:127.0.0.1"])
def test_this_machine_needs_none(address: str) -> None:
    check_exposure(reach(address), insecure=False)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer  {KEY}", 200),
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        (KEY, 401),
        (f"Basic {KEY}", 401),
        (f"Bearer {KEY[:-1]}", 401),
        (f"Bearer {KEY}x", 401),
        (f"Bearer {KEY.upper()}", 401),
        ("Bearer \xff\xfe", 401),
    ],
)
def test_the_key(sent: str | None, expected: int) -> None:
    headers = [("Host", "localhost"), *([] if sent is None else [("Authorization", sent)])]
    assert status(reach("127.0.0.1", key=KEY), *headers) == expected


def test_where_the_key_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ISQTORCH_API_KEY", raising=False)
    assert api_key(None) is None
    monkeypatch.setenv("ISQTORCH_API_KEY", KEY)
    assert api_key(None) == KEY and api_key("other") == "other"
    for wrong in ("", "two words", "ключ", "line\n", "x" * 2000):
        with pytest.raises(ValueError, match="printable ASCII characters") as error:
            api_key(wrong)
        assert not wrong or wrong not in str(error.value)
    monkeypatch.setenv("ISQTORCH_API_KEY", "")
    with pytest.raises(ValueError, match="ISQTORCH_API_KEY must have"):
        api_key(None)


# ---- a server --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """On another loopback address, with a key, and with all that it logs."""
    with serving(
        tmp_path_factory.mktemp("server"), "--host", "127.0.0.2", "--log-level", "info", ISQTORCH_API_KEY=KEY
    ) as running:
        yield running


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/completions", "/re_isq", "/none"])
def test_every_request_needs_the_key(server: Server, path: str) -> None:
    body = None if path in ("/health", "/v1/models", "/none") else {"prompt": "x", "isq": "q8_0"}
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        code, answer = server.ask(path, body, headers)
        assert code == 401 and "Authorization: Bearer KEY" in answer["error"]["message"]
    assert server.ask("/health", None, {"Authorization": f"Bearer {KEY}"})[1]["isq"] == "4"


def test_the_openai_client_sends_the_key(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    assert client.completions.create(model="default", prompt="The", max_tokens=2).choices[0].text
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="other", max_retries=0).models.list()


def test_a_page_that_rebinds_its_name(server: Server) -> None:
    port = server.address.rpartition(":")[2]
    page = {"Host": f"page.example:{port}", "Origin": f"http://page.example:{port}", "Authorization": f"Bearer {KEY}"}
    for path, body in (("/health", None), ("/re_isq", {"isq": "q8_0"}), ("/v1/completions", {"prompt": "x"})):
        assert server.ask(path, body, page)[0] == 403


def test_no_websocket_is_opened(server: Server) -> None:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "x"}
    assert server.ask("/health", None, upgrade)[0] == 401
    assert server.ask("/health", None, {**upgrade, "Authorization": f"Bearer {KEY}"})[0] == 200


def test_the_key_is_in_no_log(tmp_path: Path) -> None:
    running = start(
        tmp_path, "-m", str(MODEL), "--port", "0", "--log-level", "info", "--api-key", KEY, "--allow-host", "a.example"
    )
    code, _ = running.ask("/health", None, {"Authorization": f"Bearer {KEY}", "Host": "a.example"})
    assert code == 200 and running.ask("/health")[0] == 401
    assert KEY not in str(running.ready)
    log = running.end()
    assert "401" in log and KEY not in log and "Traceback" not in log


def test_ipv6(tmp_path: Path) -> None:
    try:
        bind("::1", 0).close()
    except OSError:
        pytest.skip("this machine has no ::1")
    running = start(tmp_path, "-m", str(MODEL), "--port", "0", "--host", "::1")
    try:
        assert running.url.startswith("http://[::1]:")
        assert running.ask("/health")[0] == 200
        assert running.ask("/health", None, {"Host": "page.example"})[0] == 403
    finally:
        assert "Traceback" not in running.end()


def test_the_promises_are_written_down() -> None:
    text = " ".join((ROOT / "SECURITY.md").read_text(encoding="utf-8").split())
    for word in ("--allow-host", "--insecure", "ISQTORCH_API_KEY", "list of processes", "Origin", "Host"):
        assert word in text
