"""A router for a vLLM prefill engine and a vLLM decode engine that share caches over kvwire.

    python examples/vllm_router.py --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200 \\
        --decode-kvwire 127.0.0.1:7300 --port 8000

Each completion goes to both engines at once, with a ticket that the router makes up: prefill reads
the prompt and pushes the cache to the decode engine's kvwire address while it computes; decode
answers. If prefill fails, decode computes the prompt itself when its lease has ended (lease_s).
Standard library only; how to start the engines is in examples/README.md.
"""

import argparse
import json
import secrets
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PATHS = ("/v1/completions", "/v1/chat/completions")
TIMEOUT_SECONDS = 600
COPY_BYTES = 1 << 14


def ask(engine, path, body):
    """Send one request; returns the open response. Raises urllib.error.URLError."""
    return urllib.request.urlopen(urllib.request.Request(
        engine + path, json.dumps(body).encode(), {"Content-Type": "application/json"}),
        timeout=TIMEOUT_SECONDS)


def split(body, addresses):
    """Return what prefill and what decode are told."""
    ticket = secrets.token_hex(16)
    prefill = {key: value for key, value in body.items() if key != "stream_options"} | {
        "stream": False, "max_tokens": 1, "kv_transfer_params": {
            "do_remote_decode": True, "ticket": ticket, "decode_addresses": addresses}}
    decode = body | {"kv_transfer_params": {"do_remote_prefill": True, "ticket": ticket}}
    return prefill, decode


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        if self.path not in PATHS:
            return self.send_error(404)
        prefill, decode = split(body, self.server.addresses)
        prefilled = threading.Thread(target=self.prefill, args=(prefill,))
        prefilled.start()
        try:
            self.answer(decode)
        finally:
            prefilled.join()

    def prefill(self, body):
        try:
            ask(self.server.prefill, self.path, body).read()
        except OSError as error:
            self.log_error("prefill: %s; decode will wait for its lease and compute it", error)

    def answer(self, body):
        try:
            response = ask(self.server.decode, self.path, body)
        except urllib.error.HTTPError as error:
            response = error
        except OSError as error:
            return self.send_error(502, f"decode: {error}")
        with response:
            self.send_response(response.status)
            self.send_header("Content-Type", response.headers.get("Content-Type", "text/plain"))
            self.send_header("Connection", "close")
            self.end_headers()
            while piece := response.read1(COPY_BYTES):
                self.wfile.write(piece)
                self.wfile.flush()
        self.close_connection = True


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prefill", default="http://127.0.0.1:8100")
    parser.add_argument("--decode", default="http://127.0.0.1:8200")
    parser.add_argument("--decode-kvwire", nargs="+", default=["127.0.0.1:7300"],
                        help="decode_listen of each rank of the decode engine")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
    server.prefill, server.decode = options.prefill, options.decode
    server.addresses = options.decode_kvwire
    print(f"http://127.0.0.1:{options.port}/v1/completions", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
