"Fetching a published model, from a server on this machine that answers as the hub does."
import hashlib, os, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cxr_gan.architectures import LeanGenerator
from cxr_gan.core import set_seed
from cxr_gan.training import save_network

@pytest.fixture
def hub(tmp_path):
    "Address of a hub with one model, me/lean, and the requests it got."
    set_seed(0); save_network(LeanGenerator(16, width=4), tmp_path/'up', classes=['a', 'b', 'c'])
    files, seen = {f.name: f.read_bytes() for f in (tmp_path/'up').iterdir()}, []
    class Hub(BaseHTTPRequestHandler):
        def answer(self, body=True):
            seen.append((self.command, self.path))
            data = files.get(self.path.rsplit('/', 1)[1]) if self.path.startswith('/me/lean/resolve/main/') else None
            self.send_response(200 if data else 404)
            if data:
                for k, v in (('ETag', f'"{hashlib.sha1(data).hexdigest()}"'), ('X-Repo-Commit', '0'*40), ('Content-Length', len(data)), ('Accept-Ranges', 'bytes')): self.send_header(k, str(v))
            else: self.send_header('X-Error-Code', 'RepoNotFound'); self.send_header('Content-Length', '0')
            self.end_headers()
            if data and body: self.wfile.write(data)
        def do_GET(self): self.answer()
        def do_HEAD(self): self.answer(False)
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub); threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}', seen
    server.shutdown()

def asked(code, address, cache):
    env = {**os.environ, 'HF_ENDPOINT': address, 'HF_HOME': str(cache), 'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_TELEMETRY': '1', 'NO_PROXY': '127.0.0.1'}
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', code], env=env, capture_output=True, text=True)

LOAD = "from cxr_gan.training import load_network; net, meta = load_network('hf://%s'); print(type(net).__name__, meta['classes'])"

def test_published_model(hub, tmp_path):
    address, seen = hub
    r = asked(LOAD % 'me/lean', address, tmp_path/'cache'); assert "LeanGenerator ['a', 'b', 'c']" in r.stdout, r.stderr
    assert {p.rsplit('/', 1)[1] for _, p in seen} == {'config.json', 'model.safetensors'}
    out = tmp_path/'films'
    r = asked(f"import sys; sys.argv = ['cxr-gan', 'generate', 'hf://me/lean', '--n', '3', '--device', 'cpu', '--out', {str(out)!r}]; from cxr_gan.cli import main; main()", address, tmp_path/'cache')
    assert r.returncode == 0 and sorted(p.name for p in out.iterdir()) == ['a', 'b', 'c', 'contact_sheet.png'], r.stderr
    assert sum(c == 'GET' for c, _ in seen) == 2, 'fetched once'

def test_no_such_model(hub, tmp_path):
    r = asked(LOAD % 'me/other', hub[0], tmp_path/'cache'); assert 'FileNotFoundError: hf://me/other cannot be had' in r.stderr and 'check the name' in r.stderr
    r = asked(LOAD % 'me/lean', 'http://127.0.0.1:9', tmp_path/'empty'); assert 'FileNotFoundError: hf://me/lean cannot be had' in r.stderr
    r = asked("import sys; sys.modules['huggingface_hub'] = None\n"+LOAD % 'me/lean', hub[0], tmp_path/'cache'); assert "pip install 'cxr_gan[hub]'" in r.stderr
