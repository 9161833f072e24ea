"""A hub on this machine that answers as the Hugging Face hub does, and misbehaves where a test asks for it."""
import hashlib
import http.server
import json
import threading
import time
import urllib.parse


def git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """repos: {"owner/repo": {"path": bytes}}. Files of more than `lfs_from` bytes are LFS files. `fault` is called with
    (handler, repo, path, first, last) before a file's bytes are sent, and returns True when it has answered itself."""

    def __init__(self, repos, lfs_from=2000):
        self.repos, self.lfs_from = repos, lfs_from
        self.fault = None         # see above
        self.tree_fault = None    # the same for the list, (handler, repo)
        self.edit = lambda entries: entries  # of the list, before it is sent
        self.log = []             # (path, Range header, Authorization header)
        self.sent = 0             # bytes of files
        self.cdn = None           # another Hub that LFS files are redirected to
        self.ranges = True
        self.lock = threading.Lock()
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def handle(self):
                try:
                    super().handle()
                except (BrokenPipeError, ConnectionResetError):
                    pass

            def do_GET(self):
                hub.answer(self)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # of clients that hang up
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    # ---- answers ----

    def send(self, h, status, body=b"", headers=()):
        h.send_response(status)
        for k, v in headers:
            h.send_header(k, v)
        h.send_header("Content-Length", str(len(body)))
        h.end_headers()
        h.wfile.write(body)

    def answer(self, h):
        url = urllib.parse.urlsplit(h.path)
        path = urllib.parse.unquote(url.path)
        with self.lock:
            self.log.append((path, h.headers.get("Range"), h.headers.get("Authorization")))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and parts[4:6] == ["tree", "main"]:
            return self.tree(h, "/".join(parts[2:4]))
        if len(parts) > 4 and parts[2:4] == ["resolve", "main"]:
            return self.file(h, "/".join(parts[:2]), "/".join(parts[4:]))
        self.send(h, 404)

    def entry(self, path, data):
        e = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        if len(data) > self.lfs_from:
            e["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return e

    def tree(self, h, repo):
        if self.tree_fault and self.tree_fault(h, repo):
            return
        if repo not in self.repos:
            return self.send(h, 404)
        entries = [{"type": "directory", "path": "original", "size": 0, "oid": "0" * 40}]
        entries += [self.entry(p, d) for p, d in self.repos[repo].items()]
        self.send(h, 200, json.dumps(self.edit(entries)).encode(), [("Content-Type", "application/json")])

    def file(self, h, repo, path):
        data = self.repos.get(repo, {}).get(path)
        if data is None:
            return self.send(h, 404)
        if self.cdn and len(data) > self.lfs_from:
            return self.send(h, 302, headers=[("Location", self.cdn.url + h.path), ("X-Linked-Size", str(len(data))),
                                              ("X-Linked-Etag", '"%s"' % hashlib.sha256(data).hexdigest())])
        first, last, ranged = 0, len(data) - 1, h.headers.get("Range") if self.ranges else None
        if ranged:
            first, last = (int(x) for x in ranged.split("=")[1].split("-"))
        if self.fault and self.fault(h, repo, path, first, last):
            return
        self.send_part(h, data, first, last, ranged)

    def send_part(self, h, data, first, last, ranged, cut=None, pause=0, content_range=None):
        body = data[first:last + 1]
        h.send_response(206 if ranged else 200)
        if ranged:
            h.send_header("Content-Range", content_range or f"bytes {first}-{last}/{len(data)}")
        h.send_header("Content-Length", str(len(body)))
        h.end_headers()
        body = body if cut is None else body[:cut]
        for at in range(0, len(body), 65536):
            h.wfile.write(body[at:at + 65536])
            with self.lock:
                self.sent += len(body[at:at + 65536])
            if pause:
                time.sleep(pause)
        if cut is not None:
            h.close_connection = True
            h.wfile.flush()
            h.connection.shutdown(2)
