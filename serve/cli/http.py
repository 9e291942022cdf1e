"""Flags of the address, of who may ask and how much, and of HTTP's own log."""

from __future__ import annotations

from argparse import _ArgumentGroup as Group

from serve.cli.types import SWITCH, integer, paths, seconds

LEVELS = ["critical", "error", "warning", "info", "debug", "trace"]


def add(http: Group) -> None:
    """Adds the flags; each is a field of ServerConfig under its name."""
    http.add_argument("--host", default="127.0.0.1", help="address to bind; 0.0.0.0 is every interface")
    http.add_argument("--port", type=integer(0, 65535), default=8000, help="0 takes a free one and prints it")
    http.add_argument("--uds", metavar="PATH", help="a Unix socket to bind in place of host and port")
    http.add_argument("--ssl-certfile", metavar="FILE", help="certificate (PEM): the server speaks HTTPS")
    http.add_argument("--ssl-keyfile", metavar="FILE", help="its key, where that is in a file of its own")
    http.add_argument("--ssl-ca-certs", metavar="FILE", help="certificates (PEM) that those of clients are checked by")
    http.add_argument(
        "--ssl-cert-reqs",
        type=integer(0, 2),
        default=0,
        help="whether a client needs a certificate: 0 no, 1 one that it shows is checked, 2 yes",
    )
    http.add_argument("--ssl-ciphers", metavar="LIST", help="for TLS up to 1.2, in OpenSSL's words")
    http.add_argument("--root-path", default="", metavar="PATH", help="the path under which a proxy shows this server")
    http.add_argument(
        "--served-model-name",
        nargs="+",
        default=(),
        metavar="NAME",
        help="names that requests use; the first is shown (default: MODEL as it is given)",
    )
    http.add_argument(
        "--api-key",
        nargs="+",
        metavar="KEY",
        help="keys that open everything but /health, /ping and /live (default: $VLLM_API_KEY)",
    )
    http.add_argument(
        "--max-num-queued-reqs",
        type=integer(1),
        default=1152,
        help="sequences that may run or wait at once; more are answered 503",
    )
    http.add_argument(
        "--max-num-queued-tokens",
        type=integer(1),
        metavar="TOKENS",
        help="prompt tokens that may wait for a first token; while there are as many, others are answered 503",
    )
    http.add_argument("--max-body-bytes", type=integer(1), default=8 << 20, help="larger bodies are answered 413")
    http.add_argument(
        "--shutdown-timeout", type=seconds, default=25.0, help="seconds that running requests get on SIGTERM or Ctrl-C"
    )
    http.add_argument(
        "--enable-log-requests", action=SWITCH, default=False, help="one line a request: tokens, time, reason"
    )
    http.add_argument(
        "--uvicorn-log-level", choices=LEVELS, default="warning", help="from info on, each HTTP request is a line"
    )
    http.add_argument("--disable-uvicorn-access-log", action=SWITCH, default=False, help="but not with this")
    http.add_argument(
        "--disable-access-log-for-endpoints",
        type=paths,
        default=(),
        metavar="PATHS",
        help="nor for these: /health,/metrics",
    )
    http.add_argument(
        "--enable-tokenizer-info-endpoint",
        action=SWITCH,
        default=False,
        help="/tokenizer_info shows tokenizer_config.json",
    )
    http.add_argument("--disable-fastapi-docs", action=SWITCH, default=False, help="no /docs, /redoc and /openapi.json")
