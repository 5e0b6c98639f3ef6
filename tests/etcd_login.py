"""An etcd that asks for a password besides a certificate."""

from __future__ import annotations

import json
import ssl
import urllib.request
from typing import Any

from services.bootstrap.store.etcd_server import EtcdServer
from tests.certificates import Authority

PASSWORD = "p@ss:word"


def need_password(server: EtcdServer, authority: Authority) -> None:
    """From now on only user root, with `PASSWORD`, may read and write."""
    admin = authority.issue("admin", "admin.example")
    context = ssl.create_default_context(cafile=admin.ca)
    context.load_cert_chain(admin.cert, admin.key)

    def post(path: str, body: dict[str, Any]) -> None:
        url = f"https://{server.endpoint}/v3/auth/{path}"
        request = urllib.request.Request(url, json.dumps(body).encode())
        urllib.request.urlopen(request, timeout=10, context=context).close()

    post("user/add", {"name": "root", "password": PASSWORD})
    post("role/add", {"name": "root"})
    post("user/grant", {"user": "root", "role": "root"})
    post("enable", {})
