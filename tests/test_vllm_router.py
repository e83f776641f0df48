"""examples/vllm_router.py between two engines that are imitated."""

import importlib.util
import json
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ADDRESSES = ["127.0.0.1:7300", "127.0.0.1:7301"]


@pytest.fixture
def serve():
    servers = []

    def start(handler, **attributes):
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        vars(server).update(attributes)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def router():
    spec = importlib.util.spec_from_file_location("vllm_router",
                                                  HERE.parent / "examples" / "vllm_router.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Imitation(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.says)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def ask(serve, router):
    def start(decode_status=200, prefill_status=200):
        asked = [], []
        prefill = serve(Imitation, asked=asked[0], says=b"{}", status=prefill_status)
        decode = serve(Imitation, asked=asked[1], says=b"the text", status=decode_status)
        router.Handler.log_message = router.Handler.log_error = lambda *arguments: None
        front = serve(router.Handler, prefill=prefill, decode=decode, addresses=ADDRESSES)

        def post(path, **body):
            request = urllib.request.Request(front + path, json.dumps(body).encode())
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.read()

        return post, asked
    return start


def test_both_engines_get_one_ticket(ask):
    post, (prefill, decode) = ask()
    assert post("/v1/completions", prompt=[1, 2], max_tokens=9, stream=True,
                stream_options={}) == b"the text"
    [(_, there)], [(path, here)] = prefill, decode
    assert path == "/v1/completions" and here["max_tokens"] == 9 and here["stream"]
    assert there["max_tokens"] == 1 and not there["stream"] and "stream_options" not in there
    sent, wanted = there["kv_transfer_params"], here["kv_transfer_params"]
    assert sent.pop("ticket") == wanted.pop("ticket")
    assert sent == {"do_remote_decode": True, "decode_addresses": ADDRESSES}
    assert wanted == {"do_remote_prefill": True}
    post("/v1/chat/completions", messages=[])
    [again], [same] = prefill[1:], decode[1:]
    ticket = again[1]["kv_transfer_params"]["ticket"]
    assert ticket == same[1]["kv_transfer_params"]["ticket"] and len(bytes.fromhex(ticket)) == 16


def test_what_decode_says_is_passed_on(ask):
    post, _ = ask(decode_status=400, prefill_status=500)
    with pytest.raises(urllib.error.HTTPError) as caught:
        post("/v1/completions", prompt=[1])
    assert caught.value.code == 400 and caught.value.read() == b"the text"
    with pytest.raises(urllib.error.HTTPError) as caught:
        post("/v1/other", prompt=[1])
    assert caught.value.code == 404
