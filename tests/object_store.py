"""A local server of Google Cloud Storage's protocol, for `gs://` paths in tests: gcsfs and tensorstore talk to it.

It is `gcp-storage-emulator`, which keeps objects in memory, and what it lacks: the condition `ifGenerationMatch=0` (an
object is created only if there is none of its name), the generation of what is read (without it tensorstore cannot
write the object again), a bucket that may not be written, and uploads in two parts whose bytes are kept as they are. It
answers one request after the other, so that the condition holds.

    python tests/object_store.py 19400      # serves gs://bucket and gs://read-only until it is killed
"""

import contextlib
import json
import re
import sys
import threading
from functools import partial
from http import server
from urllib.parse import unquote

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets, objects
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

BUCKET, READ_ONLY = "gs://bucket", "gs://read-only"


class Handler(RequestHandler):
    def do_POST(self):
        if not self.path.startswith("/upload"):
            return super().do_POST()
        if "/b/read-only/" in self.path:
            return self.answer(403, {"error": {"code": 403, "message": "no storage.objects.create access"}})
        self.storage.only_new = "ifGenerationMatch=0" in self.path
        try:
            if "uploadType=multipart" in self.path:
                self.upload_in_two_parts()
            else:
                super().do_POST()
        except FileExistsError:
            self.answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
        finally:
            self.storage.only_new = False

    def upload_in_two_parts(self):
        """An upload of metadata and content, whose bytes the emulator would change: it reads them as an email."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        boundary = b"--" + re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
        line = re.match(rb"\r?\n", body.removeprefix(boundary))[0]
        _, metadata, rest = body.split(boundary, 2)
        content = rest.partition(line * 2)[2].rpartition(line + boundary)[0]
        bucket = re.search("/b/([^/]+)/o", self.path)[1]
        name = json.loads(metadata.partition(line * 2)[2])["name"]
        found = objects._make_object_resource("", bucket, name, "application/octet-stream", str(len(content)))
        try:
            self.storage.create_file(bucket, name, content, objects._checksums(content, found))
        except NotFound:
            return self.answer(404, {})
        self.answer(200, found)

    def end_headers(self):
        found = re.search(r"/b/([^/]+)/o/([^?]+).*alt=media", self.path)
        if self.command == "GET" and found:
            with contextlib.suppress(NotFound):
                held = self.storage.get_file_obj(found[1], unquote(found[2]))
                self.send_header("x-goog-generation", held["generation"])
        super().end_headers()

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        pass


class Objects(Storage):
    only_new = False  # whether the request in progress may not replace an object

    def create_file(self, bucket_name, file_name, content, file_obj, file_id=None):
        if self.only_new and file_name in self.objects.get(bucket_name, {}):
            raise FileExistsError
        super().create_file(bucket_name, file_name, content, file_obj, file_id)


class Server(server.HTTPServer):
    request_queue_size = 256  # tensorstore opens many connections at once

    def handle_error(self, request, client_address):
        """gcsfs asks two questions at once and hangs up on one; anything else is printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def serve(port=0):
    """A server with the two buckets, not started yet."""
    held = Objects(use_memory_fs=True)
    for name in (BUCKET, READ_ONLY):
        buckets.create_bucket(name.removeprefix("gs://"), held)
    found = Server(("127.0.0.1", port), partial(Handler, held))
    found.held = held
    return found


def start():
    """Starts a server in a thread of its own."""
    found = serve()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    return found


def environment(running):
    """The variables that make gcsfs, Google's client and tensorstore use a server, without credentials."""
    url = f"http://127.0.0.1:{running.server_address[1]}"
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "FSSPEC_GCS_TOKEN": "anon",
        "FSSPEC_GCS": '{"token": "anon"}',
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "NO_GCE_CHECK": "true",
    }


if __name__ == "__main__":
    serve(int(sys.argv[1])).serve_forever()
