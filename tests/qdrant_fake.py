"""A Qdrant server on 127.0.0.1 for tests: qdrant-client's own local database behind Qdrant's REST paths."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from qdrant_client import QdrantClient, models

PLACES = ("memory", "path", "server")


@contextmanager
def place_of(kind, folder):
    """Options that lead to a database of that kind. It can be opened again and again, one at a time."""
    if kind == "memory":
        client = QdrantClient(":memory:")
        yield {"client": client}
        client.close()
    elif kind == "path":
        yield {"path": folder / "qdrant"}
    else:
        with FakeQdrant() as server:
            yield {"url": server.url}


class FakeQdrant:
    """`with FakeQdrant() as server: ... server.url`. Set the attributes to make it misbehave."""

    def __init__(self):
        self.key = None
        """The API key it wants."""
        self.keeps_metadata = True
        """False makes it an old server, which drops the metadata of collections."""
        self.reply = None
        """A fixed (status, headers, body) to every request."""
        self.silent = False
        """Whether it lets callers wait until the end."""
        self.denials = 0
        """How many times more it says that a collection does not exist."""
        self.indexes = {}
        """Collection and field to the kind of its payload index."""
        self.requests = []
        """Method and path of each request."""
        self.database = QdrantClient(":memory:")
        self._lock = threading.Lock()
        self._over = threading.Event()

    def __enter__(self):
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self.database.close()

    def answer(self, method, path, headers, body):
        """Status, headers and body of the answer."""
        with self._lock:
            self.requests.append((method, path))
        if self.silent:
            self._over.wait()
        if self.reply is not None:
            return self.reply
        if self.key is not None and headers.get("api-key") != self.key:
            return 401, {}, "Must provide an API key or an Authorization bearer token"
        try:
            with self._lock:
                result = self._result(method, *path.strip("/").split("/")[1:], body=body)
        except ValueError as error:
            return 400, {}, json.dumps({"status": {"error": f"Wrong input: {error}"}, "time": 0.0})
        return 200, {}, json.dumps({"result": result, "status": "ok", "time": 0.0})

    def _result(self, method, name, *what, body):
        match (method, *what):
            case ("GET", "exists"):
                self.denials -= 1
                return {"exists": self.denials < 0 and self.database.collection_exists(name)}
            case ("GET",):
                return self._info(name)
            case ("PUT",):
                made = models.CreateCollection(**body)
                return self.database.create_collection(
                    name,
                    vectors_config=made.vectors,
                    sparse_vectors_config=made.sparse_vectors,
                    metadata=made.metadata if self.keeps_metadata else None,
                )
            case ("PATCH",):
                return self.database.update_collection(name, metadata=body["metadata"] if self.keeps_metadata else None)
            case ("PUT", "index"):
                self.indexes[name, body["field_name"]] = body["field_schema"]
                return {"operation_id": 0, "status": "completed"}
            case (_, "points", *_):
                return self._of_points(method, name, *what[1:], body=body)
        raise ValueError(f"{method} {what}")

    def _of_points(self, method, name, *what, body):  # noqa: PLR0911
        match (method, *what):
            case ("PUT",):
                points = models.PointsList(**body).points
                return self.database.upsert(name, points).model_dump(mode="json")
            case ("POST",):
                return _dumped(self.database.retrieve(name, body["ids"]))
            case ("POST", "delete"):
                return self.database.delete(name, body["points"]).model_dump(mode="json")
            case ("POST", "batch"):
                operations = models.UpdateOperations(**body).operations
                return [done.model_dump(mode="json") for done in self.database.batch_update_points(name, operations)]
            case ("POST", "scroll"):
                asked = models.ScrollRequest(**body)
                found, _ = self.database.scroll(name, asked.filter, asked.limit)
                return {"points": _dumped(found)}
            case ("POST", "query", "batch"):
                asked = models.QueryRequestBatch(**body).searches
                return [{"points": _dumped(found.points)} for found in self.database.query_batch_points(name, asked)]
            case ("POST", "count"):
                return self.database.count(name).model_dump(mode="json")
            case ("POST", "query"):
                asked = models.QueryRequest(**body)
                found = self.database.query_points(
                    name,
                    query=asked.query,
                    using=asked.using,
                    prefetch=asked.prefetch,
                    query_filter=asked.filter,
                    limit=asked.limit,
                )
                return {"points": _dumped(found.points)}
        raise ValueError(f"{method} points {what}")

    def _info(self, name):
        info = self.database.get_collection(name).model_dump(mode="json")
        info["payload_schema"] = {
            field: {"data_type": kind, "points": 0}
            for (collection, field), kind in self.indexes.items()
            if collection == name
        }
        vectors = info["config"]["params"]["vectors"]
        if list(vectors or ()) == [""]:  # a server tells of the default vector without its empty name
            info["config"]["params"]["vectors"] = vectors[""]
        return info


def _dumped(records):
    return [record.model_dump(mode="json", exclude_none=True) for record in records]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A caller that hung up is no error here."""


def _handler(fake):
    class Handler(BaseHTTPRequestHandler):
        def handle_any(self):
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = urlsplit(self.path).path
            status, headers, body = fake.answer(self.command, path, self.headers, json.loads(content or "null"))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body.encode())), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_PUT = do_POST = do_PATCH = handle_any  # noqa: N815

        def log_message(self, *args):
            """Nothing on standard error."""

    return Handler
