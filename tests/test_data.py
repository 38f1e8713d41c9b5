"Bad files, damaged caches, broken downloads: what does not read as a lesson of the data chapter."
import hashlib, http.server, json, os, subprocess, sys, tempfile, threading, types, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

import cxr_gan.data as data
from cxr_gan.data import ImageSet, ResidentLoader, check_manifest, download, fetch, read_images, resident_loaders, split_set

QUICK = dict(size=16, cache=False, progress=False)


def picture(path, value=None, size=(20, 24), mode='L', seed=0, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    a = np.random.default_rng(seed).integers(0, 255, size[::-1], dtype=np.uint8) if value is None else np.full(size[::-1], value, np.uint8)
    Image.fromarray(a).convert(mode).save(path, **kw)


@pytest.fixture
def tree(tmp_path):
    root = tmp_path/'films'
    for c in ('a', 'b'):
        for i in range(4): picture(root/c/f'{c}{i}.png', seed=(c == 'b')*10+i)
    return root


def numbered(n): return ImageSet(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.arange(n), [str(i) for i in range(n)])


# ---- the zoo of bad files

def zoo(folder):
    "Every kind of file that is not a film -> words expected in its reason."
    good = folder.parent/'good.png'; picture(good, size=(200, 200)); whole = good.read_bytes(); good.unlink()
    jpeg = folder.parent/'good.jpg'; picture(jpeg, size=(200, 200)); jpg = jpeg.read_bytes(); jpeg.unlink()
    made = {'zero.png': (b'', 'zero bytes'), 'html.png': (b'<!DOCTYPE html><title>404</title>', 'not an image'), 'half.png': (whole[:len(whole)//2], ''), 'half.jpg': (jpg[:len(jpg)//2], ''),
        'head.png': (whole[:8], ''), 'noise.jpeg': (bytes(range(256))*9, 'not an image'), 'notes.txt': (b'hello', 'not an image'), 'film.dcm': (b'\0'*128+b'DICM'+b'junk', ''),
        'script.eps': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n', 'not an image')}
    for name, (content, _) in made.items(): (folder/name).write_bytes(content)
    return {f'{folder.name}/{k}': why for k, (_, why) in made.items()}


def test_bad_files_are_all_named_and_refused(tree):
    bad = zoo(tree/'a')
    with pytest.raises(ValueError) as e: read_images(tree, **QUICK)
    assert 'notes.txt' in str(e.value) and "on_error='skip'" in str(e.value)
    (tree/'a'/'notes.txt').unlink(); bad.pop('a/notes.txt')
    with pytest.raises(ValueError) as e: read_images(tree, **QUICK)
    text = str(e.value)
    assert f'{len(bad)} files' in text
    for name, why in bad.items():
        line = next(l for l in text.splitlines() if name in l)
        assert why in line and str(tree) not in line and len(line.split(': ', 1)[1]) > 5, line


def test_empty_class_folder_is_refused(tree):
    (tree/'c').mkdir()
    with pytest.raises(ValueError, match='c: an empty folder'): read_images(tree, **QUICK)
    with pytest.warns(UserWarning, match='skipped'): assert read_images(tree, on_error='skip', **QUICK).n_classes == 2
    assert read_images(tree, classes=['a'], **QUICK).counts() == {'a': 4}
    with pytest.raises(ValueError, match='empty folder'): read_images(tree, classes=['a', 'C'], **QUICK)


def test_links_in_a_circle(tree):
    (tree/'a'/'up').symlink_to(tree, target_is_directory=True)
    assert read_images(tree, **QUICK).counts() == {'a': 4, 'b': 4}


def test_skip_keeps_the_list(tree):
    bad = zoo(tree/'a')
    with pytest.warns(UserWarning, match='were skipped'): s = read_images(tree, on_error='skip', **QUICK)
    assert s.counts() == {'a': 4, 'b': 4} and {f for f, _ in s.skipped} == set(bad) and all(why for _, why in s.skipped)
    assert 'skipped: 9 files' in str(s.card())


def test_more_than_ten_bad_files_are_counted(tree):
    for i in range(25): (tree/'b'/f'x{i:02d}.png').touch()
    with pytest.raises(ValueError, match=r'25 files(.|\n)*and 15 more'): read_images(tree, **QUICK)


def test_decompression_bomb_is_listed(tree, monkeypatch):
    picture(tree/'a'/'bomb.png', value=0, size=(300, 300))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 60_000) # 90,000 pixels warn, 120,000 raise
    with warnings.catch_warnings(), pytest.raises(ValueError, match='bomb.png.*300x300 pixels'):
        warnings.simplefilter('ignore'); read_images(tree, **QUICK)
    picture(tree/'a'/'bomb.png', value=0, size=(400, 400))
    with pytest.raises(ValueError, match='bomb.png'): read_images(tree, **QUICK)


def test_unreadable_and_dangling(tree):
    (tree/'a'/'gone.png').symlink_to(tree/'nowhere.png')
    with pytest.raises(ValueError, match='gone.png'): read_images(tree, **QUICK)
    with pytest.raises(ValueError, match='gone.png'): read_images(tree, **dict(QUICK, cache=tree.parent/'cache'))


@pytest.mark.parametrize('kw,word', [(dict(on_error='ignore'), 'on_error'), (dict(channels=4), 'channels'), (dict(fit='stretch'), 'fit'), (dict(size=0), 'size'), (dict(size=12.5), 'size')])
def test_bad_arguments(tree, kw, word):
    with pytest.raises(ValueError, match=word): read_images(tree, **{**QUICK, **kw})


def test_empty_folders_and_one_image_class(tmp_path):
    with pytest.raises(ValueError, match='found no films'): read_images(tmp_path, **QUICK)
    (tmp_path/'a').mkdir(); (tmp_path/'a'/'notes.csv').touch()
    with pytest.raises(ValueError, match='1 other files'): read_images(tmp_path, **QUICK)
    for i in range(3): picture(tmp_path/'b'/f'{i}.png')
    picture(tmp_path/'c'/'0.png')
    s = read_images(tmp_path, **QUICK)
    assert s.counts() == {'b': 3, 'c': 1}
    with pytest.raises(ValueError, match="class 'c' has 1 film in 1 group"): split_set(s)


def test_no_pydicom_says_what_to_install(tree, monkeypatch):
    (tree/'a'/'film').write_bytes(b'\0'*128+b'DICM')
    monkeypatch.setitem(sys.modules, 'pydicom', None)
    with pytest.raises(ImportError, match=r'cxr_gan\[dicom\]'): read_images(tree, on_error='skip', **QUICK)


# ---- names and layouts

def test_names_of_all_sorts(tmp_path):
    root = tmp_path/'röntgen bilder'
    picture(root/'Viral Pneumonia'/'ä ö ü 中.PNG'); picture(root/'Viral Pneumonia'/'b.JpEg'); picture(root/'Viral Pneumonia'/'c'/'deep.TIF'); picture(root/'NORMAL'/'no_suffix', format='PNG')
    picture(root/'NORMAL'/'really_webp.png', format='WEBP'); picture(root/'NORMAL'/'a.bmp'); picture(root/'NORMAL'/'a.gif')
    for junk in ('.DS_Store', '._b.JpEg', 'Thumbs.db', 'desktop.ini'): (root/'NORMAL'/junk).touch()
    s = read_images(root, classes=['viral_pneumonia', 'Normal'], **QUICK)
    assert s.counts() == {'Viral Pneumonia': 3, 'NORMAL': 4} and {d['format'] for d in s.info} >= {'WEBP', 'TIFF', 'BMP', 'GIF', 'JPEG', 'PNG'}
    assert read_images(str(root/'NORMAL'), **QUICK).classes == ['NORMAL']


def test_spelling_of_a_class_may_differ_between_splits(tmp_path):
    picture(tmp_path/'train'/'Viral Pneumonia'/'a.png'); picture(tmp_path/'test'/'viral_pneumonia'/'a.png'); picture(tmp_path/'test'/'normal'/'b.png')
    s = read_images(tmp_path, **QUICK)
    assert s.n_classes == 2 and len(s.part('train')) == 1 and len(s.part('test')) == 2
    assert read_images(tmp_path/'test', **QUICK).splits == ['test', 'test']


def test_archive_packed_in_itself(tmp_path):
    for top in ('chest_xray', 'chest_xray/chest_xray', '__MACOSX/chest_xray'):
        for c in ('NORMAL', 'PNEUMONIA'): picture(tmp_path/top/'train'/c/f'{c}.jpeg')
    assert read_images(tmp_path, **QUICK).files == ['chest_xray/train/NORMAL/NORMAL.jpeg', 'chest_xray/train/PNEUMONIA/PNEUMONIA.jpeg']


def test_folder_without_classes_and_metadata_with_them(tmp_path):
    for i in range(4): picture(tmp_path/'png'/f'{i}.png')
    with pytest.warns(UserWarning, match='one class only'): s = read_images(tmp_path, **QUICK)
    assert s.classes == [tmp_path.name]
    (tmp_path/'metadata.csv').write_text('filename,class,split,patient_id\n0.png,covid,train,p1\n1.png,covid,test,p2\n2.png,normal,test,p2\n3.png,normal,train,p1\n', encoding='utf-8-sig')
    s = read_images(tmp_path, **QUICK)
    assert s.counts() == {'covid': 2, 'normal': 2} and s.groups == ['p1', 'p2', 'p2', 'p1'] and s.splits == ['train', 'test', 'test', 'train']


def test_metadata_with_equal_names_is_joined_by_path(tmp_path):
    for c in ('a', 'b'): picture(tmp_path/c/'x.png')
    (tmp_path/'metadata.csv').write_text('path,group\na/x.png,g1\nb/x.png,g2\n')
    assert read_images(tmp_path, **QUICK).groups == ['g1', 'g2']
    (tmp_path/'metadata.csv').write_text('path,group\nx.png,g1\nx.png,g2\n') # ambiguous: not joined
    assert read_images(tmp_path, **QUICK).groups == ['a/x.png', 'b/x.png']


def test_one_pixel_and_constant_films(tmp_path):
    picture(tmp_path/'a'/'1.png', value=7, size=(1, 1)); picture(tmp_path/'b'/'2.png', value=255, size=(500, 3)); picture(tmp_path/'b'/'3.png', value=0)
    for fit in ('squash', 'pad', 'crop'):
        s = read_images(tmp_path, fit=fit, **QUICK)
        assert s.images[0].unique().tolist() == [7] and s.images[2].max() == 0


def test_large_jpeg_agrees_with_plain_decoding(tmp_path):
    g = torch.nn.functional.interpolate(torch.rand(1, 1, 30, 40, generator=torch.Generator().manual_seed(0)), size=(900, 1200), mode='bicubic')[0, 0].clamp(0, 1)
    Image.fromarray((g*255).byte().numpy()).convert('RGB').save(tmp_path/'x.jpg', quality=95)
    fast, info = data._decode(tmp_path/'x.jpg', 64, 1, 'squash')
    slow = np.asarray(Image.open(tmp_path/'x.jpg').convert('L').resize((64, 64), Image.BILINEAR), dtype=int)
    assert (info['width'], info['height'], info['mode']) == (1200, 900, 'RGB') and np.abs(fast[0].astype(int)-slow).max() <= 6 and np.abs(fast[0].astype(int)-slow).mean() < 1


# ---- the cache

def test_damaged_cache_is_rebuilt(tree, tmp_path):
    kw = dict(QUICK, cache=tmp_path/'cache'); s = read_images(tree, **kw); file, = (tmp_path/'cache').iterdir(); whole = file.read_bytes()
    other = bytearray(whole); other[len(whole)//2] ^= 255
    for content in (b'', b'PK', whole[:300], bytes(other), b'\x80\x04K\x01.'):
        file.write_bytes(content)
        with pytest.warns(UserWarning, match='damaged'): assert torch.equal(read_images(tree, **kw).images, s.images)
        assert file.read_bytes()[:2] == b'PK'
    np.savez(file, images=np.zeros((1, 1, 16, 16), np.uint8), meta=np.frombuffer(b'{"info": [], "bad": {}}', np.uint8))
    with pytest.warns(UserWarning, match='damaged'): assert torch.equal(read_images(tree, **kw).images, s.images)
    np.savez(file, images=np.array([{}], object), meta=np.zeros(2, np.uint8)) # a pickle inside is not opened
    with pytest.warns(UserWarning, match='damaged'): assert torch.equal(read_images(tree, **kw).images, s.images)


def test_cache_that_cannot_be_written(tree, tmp_path):
    (tmp_path/'file').touch() # a file where the folder should be: no permission is needed to fail
    with pytest.warns(UserWarning, match='cannot be written'): assert len(read_images(tree, **dict(QUICK, cache=tmp_path/'file'/'cache'))) == 8


def test_cache_folder_and_skipped_files_in_it(tree, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg')); (tree/'a'/'zero.png').touch()
    kw = dict(QUICK, cache=True)
    with pytest.raises(ValueError, match='zero bytes'): read_images(tree, **kw)
    assert not list((tmp_path/'xdg').glob('cxr_gan/*.npz'))
    for _ in range(2):
        with pytest.warns(UserWarning, match='skipped'): s = read_images(tree, on_error='skip', **kw)
        assert s.skipped == [('a/zero.png', 'zero bytes')] and len(s) == 8
    assert len(list((tmp_path/'xdg').glob('cxr_gan/*.npz'))) == 1
    with pytest.raises(ValueError, match='zero bytes'): read_images(tree, **kw) # the list in the cache refuses too


def test_a_new_film_or_name_makes_a_new_key(tree, tmp_path):
    kw = dict(QUICK, cache=tmp_path/'cache'); read_images(tree, **kw)
    picture(tree/'a'/'new.png'); assert len(read_images(tree, **kw)) == 9
    (tree/'a'/'new.png').rename(tree/'b'/'new.png'); assert read_images(tree, **kw).counts() == {'a': 4, 'b': 5}
    assert len(list((tmp_path/'cache').iterdir())) == 3


# ---- films on disk

linux = pytest.mark.skipif(sys.platform != 'linux', reason='asks Linux what is mapped')

def on_disk(x):
    "Whether a tensor's numbers lie in a mapped file, by Linux's own account."
    rows = [l.split(maxsplit=5) for l in Path('/proc/self/maps').read_text().splitlines()]
    row = next(r for r in rows if int(r[0].split('-')[0], 16) <= x.data_ptr() < int(r[0].split('-')[1], 16))
    return len(row) > 5 and row[5].startswith('/')


@linux
def test_what_is_copied_from_disk_stays_there(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(data, '_PIECE', 600) # two films
    near = read_images(tree, mapped=False, **QUICK); assert not near.disk and not on_disk(near.images)
    sizes, nameless, write_cache = [], data._nameless, data._write_cache
    def noted(films): return (sizes.append(x.nbytes) or x for x in films)
    monkeypatch.setattr(data, '_nameless', lambda films, *a: nameless(noted(films), *a)); monkeypatch.setattr(data, '_write_cache', lambda file, films, *a: write_cache(file, noted(films), *a))
    s = read_images(tree, mapped=True, **dict(QUICK, cache=tmp_path/'cache')); s.splits = ['train', 'test']*4; n = len(os.listdir('/proc/self/fd'))
    more = [s, s.part('train'), s.only(['b']), s[::2].only(['a']), s.resized(15), s.resized(64), ImageSet.concat(s.part('test'), s), *split_set(s, .5), replace_in(tree, tmp_path)]
    assert max(sizes) <= 64*64 and max(x for x in sizes if x < 64*64) <= 600 and len(sizes) > 25 # never more than a piece at a time, or one film of 64 pixels
    assert all(on_disk(m.images) for m in more) and not on_disk(s[[0, 2]].images) and len(list((tmp_path/'cache').iterdir())) == 2
    del more; assert len(os.listdir('/proc/self/fd')) == n # the files went with the sets


def replace_in(tree, tmp_path):
    "The films read with two broken ones left out."
    for f in ('zero.png', 'null.png'): (tree/'a'/f).touch()
    with pytest.warns(UserWarning, match='skipped'): return read_images(tree, on_error='skip', mapped=True, **dict(QUICK, cache=tmp_path/'cache'))


def test_broken_films_are_listed_in_order_whichever_was_found_first(tree, monkeypatch):
    for f in ('a/first.png', 'b/last.png'): (tree/f).touch()
    slow, found = data._decode, threading.Event()
    def decode(path, *a):
        if path.name == 'first.png': found.wait(10)
        try: return slow(path, *a)
        finally: path.name == 'last.png' and threading.Timer(.2, found.set).start()
    monkeypatch.setattr(data, '_decode', decode)
    with pytest.warns(UserWarning, match='skipped'): s = read_images(tree, on_error='skip', workers=2, **QUICK)
    assert [f for f, _ in s.skipped] == ['a/first.png', 'b/last.png']


@linux
def test_a_map_may_be_larger_than_memory(tmp_path):
    if Path('/proc/sys/vm/overcommit_memory').read_text().strip() == '2': pytest.skip('this system promises no more memory than it has')
    with open(tmp_path/'large', 'wb+') as f:
        f.truncate(2**42) # all holes: four tebibytes that take no room
        x = data._map(f, (2**30, 1, 64, 64)); assert not x[2**29].any(); x[2**29] = 7
        assert x[2**29].unique().tolist() == [7] and not data._map(f, (2**30, 1, 64, 64))[2**29].any()


def test_free_memory_is_the_least_that_is_said(tmp_path, monkeypatch):
    files = [tmp_path/k for k in 'abc']; monkeypatch.setattr(data, '_LIMITS', tuple((str(f), *row[1:]) for f, row in zip(files, data._LIMITS)))
    all_there_is = data._free_memory(); assert all_there_is is None or all_there_is > 2**20
    files[0].write_text('MemTotal:  99 kB\nMemAvailable:   50 kB\n'); files[1].write_text('max\n'); assert data._free_memory() == 50*1024
    files[2].write_text('4000\n'); assert data._free_memory() == 4000
    monkeypatch.setattr(data.os, 'sysconf', None, raising=False); assert data._free_memory() == 4000
    for f in files: f.unlink(missing_ok=True)
    monkeypatch.delattr(data.os, 'sysconf', raising=False); assert data._free_memory() is None and data._fits(10**30)


@pytest.mark.parametrize('cached', [True, False])
def test_no_room_on_disk(tree, tmp_path, monkeypatch, cached):
    (tmp_path/'file').touch(); monkeypatch.setattr(data.tempfile, 'tempdir', str(tmp_path/'file'/'tmp')); kw = dict(QUICK, cache=tmp_path/'file'/'cache' if cached else False)
    with pytest.raises(OSError, match='cannot take them(.|\n)*cache=FOLDER(.|\n)*mapped=False'): read_images(tree, mapped=True, **kw)
    monkeypatch.setattr(data.tempfile, 'tempdir', str(tmp_path)); kw = dict(QUICK, cache=tmp_path/'cache' if cached else False)
    asked = []; monkeypatch.setattr(data, '_decode', lambda *a: asked.append(a))
    monkeypatch.setattr(data.shutil, 'disk_usage', lambda folder: types.SimpleNamespace(free=8*16*16-1))
    with pytest.raises(OSError, match='No space left'): read_images(tree, mapped=True, **kw)
    assert not asked # it is known before the first film


@linux
def test_disk_that_fills_up_on_the_way(tree, tmp_path, monkeypatch):
    import resource
    monkeypatch.setattr(data, '_PIECE', 300); s = read_images(tree, mapped=True, **dict(QUICK, cache=tmp_path/'cache')); limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1])) # no file may grow beyond two films and a bit
        for f in (lambda: s[::2], lambda: read_images(tree, mapped=True, **QUICK), lambda: read_images(tree, mapped=True, **dict(QUICK, size=17, cache=tmp_path/'cache'))):
            with pytest.raises(OSError, match='File too large.*make room there'): f()
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(list((tmp_path/'cache').iterdir())) == 1


KILLED = """
import os, signal, sys, cxr_gan.data as data
data._PIECE, slow, n = 300, data._decode, []
def decode(*a):
    n.append(a)
    if len(n) == 6: os.kill(os.getpid(), signal.SIGKILL)
    return slow(*a)
data._decode = decode
data.read_images(sys.argv[1], 16, cache=sys.argv[2], mapped=True, workers=1)
"""


@pytest.mark.skipif(os.name == 'nt', reason='kills a process')
def test_a_killed_reading_leaves_nothing_that_looks_whole(tree, tmp_path):
    cache = tmp_path/'cache'
    assert subprocess.run([sys.executable, '-c', KILLED, str(tree), str(cache)]).returncode == -9
    left, = cache.iterdir(); assert left.name.startswith('.')
    kw = dict(QUICK, mapped=True, cache=cache); s = read_images(tree, **kw); assert left.exists() # another process may be at work on it
    assert torch.equal(s.images, read_images(tree, **QUICK).images)
    whole = next(f for f in cache.iterdir() if f != left); whole.unlink(); os.utime(left, (1, 1)); read_images(tree, **kw); assert list(cache.iterdir()) == [whole]


def test_a_mapped_set_outlives_its_cache(tree, tmp_path):
    kw = dict(QUICK, cache=tmp_path/'cache'); s = read_images(tree, mapped=True, **kw); before = s.images.clone(); file, = (tmp_path/'cache').iterdir()
    s.images[0] = 9; assert torch.equal(read_images(tree, **kw).images, before) # what is written to the films does not reach the file
    file.unlink(); assert torch.equal(s.images[1:], before[1:])


def test_damaged_cache_is_not_mapped(tree, tmp_path):
    kw = dict(QUICK, cache=tmp_path/'cache', mapped=True); s = read_images(tree, **kw); file, = (tmp_path/'cache').iterdir(); whole = file.read_bytes(); films = s.images.clone(); del s
    other = bytearray(whole); other[len(whole)//2] ^= 255
    for content in (b'', b'PK', whole[:300], whole[:-30], bytes(other)):
        file.write_bytes(content)
        with pytest.warns(UserWarning, match='damaged'): assert torch.equal(read_images(tree, **kw).images, films)
        assert file.read_bytes() == whole
    for x in (np.zeros((8, 1, 16, 16), np.int8), np.zeros((7, 1, 16, 16), np.uint8)):
        np.savez(file, images=x, meta=np.frombuffer(json.dumps(dict(info=[{}]*len(x), bad={})).encode(), np.uint8))
        with pytest.warns(UserWarning, match='damaged'): assert torch.equal(read_images(tree, **kw).images, films)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), c=st.sampled_from([1, 3]), piece=st.integers(1, 900), bs=st.integers(1, 12), seed=st.integers(0, 99), stop=st.integers(0, 40), shuffle=st.booleans())
def test_films_on_disk_give_the_same_batches(n, c, piece, bs, seed, stop, shuffle):
    with tempfile.TemporaryDirectory() as d, pytest.MonkeyPatch.context() as m:
        m.setattr(data, '_PIECE', piece); g = torch.Generator().manual_seed(seed)
        near = ImageSet(torch.randint(0, 256, (n, c, 4, 5), generator=g).to(torch.uint8).mT, torch.arange(n) % 2, ['a', 'b'])
        far = data.replace(near, images=data._nameless(near.images.split(7), near.images.shape, d), disk=d)
        at = torch.randint(-n, n, (n,), generator=g)
        for a, b in ((near, far), (near[at], far[at]), (near[n//3:], far[n//3:]), (near.only(['a']), far.only(['a'])), (near.resized(6), far.resized(6))):
            assert torch.equal(a.images, b.images) and a.fingerprint == b.fingerprint and b.disk == d
            dls = [ResidentLoader(s, bs=bs, seed=seed, shuffle=shuffle, device='cpu') for s in (a, b)]
            its = [iter(dl) for dl in dls]
            for _ in range(stop % len(dls[0])): assert same(*map(next, its))
            new = [ResidentLoader(s, bs=bs, seed=seed+1, shuffle=shuffle, device='cpu') for s in (b, a)] # each goes on with the other's state
            for dl, other in zip(new, dls): dl.load_state_dict(other.state_dict())
            for _ in range(2): rows = [[*dl] for dl in new]; assert len(rows[0]) == len(rows[1]) and all(map(same, *rows))


def test_training_on_films_on_disk_is_the_same_training(tree, tmp_path, monkeypatch):
    from cxr_gan.recipes import learner, recipe
    monkeypatch.setattr(data, '_PIECE', 600); runs = {}
    for mapped in (None, True):
        s = read_images(tree, 16, cache=tmp_path/'cache', mapped=mapped).only(['b', 'a'])
        l = learner(recipe('lean', width=4, bs=3), s, 8, device='cpu')
        with l.no_bar(), l.no_logging(): l.fit_for(steps=5)
        runs[mapped] = l.model.state_dict(); assert bool(l.dls.train.dataset.disk) == bool(mapped)
    for k, v in runs[None].items(): torch.testing.assert_close(v, runs[True][k], rtol=0, atol=0)


def same(a, b): return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b))


# ---- the loader

@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 70), bs=st.integers(1, 80), seed=st.integers(0, 2**31), drop_last=st.booleans(), stop=st.integers(0, 70))
def test_every_film_once_an_epoch_and_exact_resume(n, bs, seed, drop_last, stop):
    if drop_last and bs > n: return
    dl = ResidentLoader(numbered(n), bs=bs, seed=seed, drop_last=drop_last, device='cpu')
    for _ in range(2):
        seen = [y for _, y in dl]
        assert len(seen) == len(dl) and all(len(y) == bs for y in seen[:-1])
        flat = torch.cat(seen).tolist()
        assert len(set(flat)) == len(flat) == (n//bs*bs if drop_last else n)
    it, stop = iter(dl), 1+stop % len(dl)
    for _ in range(stop): next(it)
    state = dl.state_dict(); rest = [y.tolist() for _, y in it]+[y.tolist() for _, y in dl]
    new = ResidentLoader(numbered(n), bs=bs, seed=seed+1, drop_last=drop_last, device='cpu'); new.load_state_dict(state)
    again = [y.tolist() for _, y in new]
    if stop < len(dl): again += [y.tolist() for _, y in new]
    assert again == rest


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 60), bs=st.integers(1, 9), world=st.integers(1, 5), seed=st.integers(0, 99))
def test_processes_together_see_the_batches_of_one(n, bs, world, seed):
    if world*bs > n: return
    one = [y.tolist() for _, y in ResidentLoader(numbered(n), bs=bs*world, seed=seed, drop_last=True, device='cpu')]
    parts = [[y.tolist() for _, y in ResidentLoader(numbered(n), bs=bs, seed=seed, drop_last=True, device='cpu').divide(r, world)] for r in range(world)]
    assert all(len(b) == bs for p in parts for b in p) and [sorted(sum(b, [])) for b in zip(*parts)] == [sorted(b) for b in one]

@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 2)), min_size=2, max_size=40), test=st.floats(.05, .95), seed=st.integers(0, 9))
def test_split_never_parts_a_group(sizes, test, seed):
    labels = [k for n, k in sizes for _ in range(n)]; groups = [f'g{i}' for i, (n, _) in enumerate(sizes) for _ in range(n)]
    s = ImageSet(torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), labels, ['x', 'y', 'z'], groups)
    if min(sum(k == c for _, k in sizes) for c in range(3)) < 2:
        with pytest.raises(ValueError, match='expected at least 2 groups'): split_set(s, test, seed)
        return
    a, b = split_set(s, test, seed)
    assert not set(a.groups) & set(b.groups) and len(a)+len(b) == len(s) and min(a.counts().values()) > 0 < min(b.counts().values())
    for c in range(3): # off by no more than one group
        n = labels.count(c); assert abs(b.labels.eq(c).sum().item()-max(1, n*test)) <= max(g for g, k in sizes if k == c)+1


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 15), st.integers(0, 30)), min_size=1, max_size=80), test=st.floats(.05, .95), seed=st.integers(0, 9))
def test_split_of_several_findings(rows, test, seed):
    y = torch.tensor([[bits >> k & 1 for k in range(4)] for bits, _ in rows]).float(); groups = [f'g{g}' for _, g in rows]
    s = ImageSet(torch.zeros(len(y), 1, 1, 1, dtype=torch.uint8), y, ['a', 'b', 'c', 'd'], groups)
    alone = [len({g for g, on in zip(groups, y[:, k]) if on}) < 2 for k in range(4)]
    try: a, b = split_set(s, test, seed)
    except ValueError as e: assert ('expected at least 2 groups' in str(e)) == any(alone) and (any(alone) or 'cannot be divided' in str(e)); return
    assert not any(alone) and not set(a.groups) & set(b.groups) and sorted(a.files+b.files) == s.files
    assert min(a.counts().values()) > 0 < min(b.counts().values()) and torch.equal(a.labels.sum(0)+b.labels.sum(0), y.sum(0))
    order = torch.randperm(len(y)); assert sorted(split_set(s[order], test, seed)[1].files) == b.files


def test_several_findings_resume_and_learn():
    from fastai.callback.progress import ProgressCallback
    from fastai.learner import Learner
    from fastai.losses import BCEWithLogitsLossFlat
    y = (torch.rand(20, 3, generator=torch.Generator().manual_seed(0)) < .4).float()
    s = ImageSet(torch.randint(0, 255, (20, 1, 4, 4), dtype=torch.uint8), y, ['a', 'b', 'c'])
    dl = ResidentLoader(s, bs=6, device='cpu', seed=1); it = iter(dl); next(it); state = dl.state_dict(); rest = torch.cat([y for _, y in it])
    again = ResidentLoader(s, bs=6, device='cpu', seed=7); again.load_state_dict(state)
    assert torch.equal(torch.cat([y for _, y in again]), rest) and rest.shape == (14, 3)
    learn = Learner(resident_loaders(s, s, bs=5, device='cpu'), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)), loss_func=BCEWithLogitsLossFlat())
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(1)
    assert torch.equal(learn.get_preds()[1].as_subclass(torch.Tensor), y)
    learn.show_results()


def test_medmnist_of_several_findings(tmp_path):
    x, y = np.zeros((5, 28, 28), np.uint8), np.eye(5, 14, dtype=np.uint8)
    np.savez(tmp_path/'chestmnist.npz', train_images=x, train_labels=y, val_images=x, val_labels=1-y)
    s = read_images(tmp_path/'chestmnist.npz', size=8, classes=['nodule', 'atelectasis'])
    assert s.several and s.counts() == {'nodule': 5, 'atelectasis': 5} and s.labels[0].tolist() == [0, 1] and 'several findings a film' in s.card().__str__()
    np.savez(tmp_path/'chestmnist.npz', train_images=x, train_labels=2*y)
    with pytest.raises(ValueError, match='expected weights from 0 to 1'): read_images(tmp_path/'chestmnist.npz')


def test_one_loader_twice_at_once():
    dl = ResidentLoader(numbered(9), bs=2, device='cpu')
    outer = [(sorted(y.item() for _, ys in dl for y in ys), x) for _, x in dl]
    assert all(inner == list(range(9)) for inner, _ in outer) and sorted(torch.cat([x for _, x in outer]).tolist()) == list(range(9))


def test_state_is_plain_and_global_stream_untouched():
    dl = ResidentLoader(numbered(9), bs=2, device='cpu')
    torch.manual_seed(0); a = torch.rand(1); torch.manual_seed(0); next(iter(dl)); assert torch.equal(torch.rand(1), a)
    assert all(isinstance(v, (int, torch.Tensor)) for v in dl.state_dict().values())


def test_films_stay_bytes_and_are_not_copied():
    s = numbered(8); dl = ResidentLoader(s, bs=4, device='cpu', value_range=(0, 1))
    assert dl._x.data_ptr() == s.images.data_ptr() and dl.one_batch()[0].min() == 0
    assert dl.to('cpu').device == torch.device('cpu') and dl.new(bs=2).bs == 2 and dl.new(shuffle=False).value_range == (0, 1)


def test_fastai_learner_trains_and_predicts_in_order():
    from fastai.callback.progress import ProgressCallback
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    from fastai.metrics import accuracy
    y = torch.arange(60) % 2; x = (y*200)[:, None, None, None].expand(-1, 1, 4, 4).to(torch.uint8)
    s = ImageSet(x.clone(), y, ['dark', 'light']); dls = resident_loaders(*split_set(s), bs=8, device='cpu')
    torch.manual_seed(0); learn = Learner(dls, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)), loss_func=CrossEntropyLossFlat(), metrics=accuracy, lr=.05)
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(3)
    assert learn.validate()[1] == 1. and learn.get_preds(ds_idx=0)[1].tolist() == dls.train.dataset.labels.tolist()
    learn.show_results(max_n=2)


# ---- downloads: a server on this machine

class Server(http.server.BaseHTTPRequestHandler):
    content, ranges, cut, fail, asked = b'', True, 0, 0, []
    def log_message(self, *a): pass
    def do_GET(self):
        cls = type(self); start = 0; cls.asked.append(self.headers.get('Range'))
        if cls.fail: cls.fail -= 1; return self.send_error(503)
        if cls.ranges and self.headers.get('Range'):
            start = int(self.headers['Range'][6:].split('-')[0])
            if start >= len(cls.content): return self.send_error(416)
        body = cls.content[start:]
        self.send_response(206 if start else 200); self.send_header('Content-Length', str(len(body))); self.end_headers()
        if cls.cut: body, cls.cut = body[:cls.cut], 0 # the line goes dead once
        self.wfile.write(body)


@pytest.fixture
def server():
    Server.content, Server.ranges, Server.cut, Server.fail, Server.asked = os.urandom(300_000), True, 0, 0, []
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server); t = threading.Thread(target=s.serve_forever, daemon=True); t.start()
    yield f'http://127.0.0.1:{s.server_port}/film.npz'
    s.shutdown(); s.server_close()


def md5(b): return hashlib.md5(b).hexdigest()


def test_fetch_goes_on_where_it_stopped(server, tmp_path):
    Server.cut = 100_000
    assert fetch(server, tmp_path/'f', md5(Server.content), wait=.01).read_bytes() == Server.content
    assert len(Server.asked) == 2 and Server.asked[0] is None and Server.asked[1].startswith('bytes=') and Server.asked[1] != 'bytes=0-'
    fetch(server, tmp_path/'f', md5(Server.content)); assert len(Server.asked) == 2 and not (tmp_path/'f.part').exists() # there already


def test_fetch_from_a_server_without_ranges(server, tmp_path):
    Server.ranges, Server.cut = False, 1000
    assert fetch(server, tmp_path/'f', md5(Server.content), wait=.01).read_bytes() == Server.content


def test_fetch_replaces_a_wrong_part_or_file(server, tmp_path):
    (tmp_path/'f.part').write_bytes(b'x'*1000); (tmp_path/'f').write_bytes(b'old')
    assert fetch(server, tmp_path/'f', md5(Server.content), wait=.01).read_bytes() == Server.content
    (tmp_path/'g.part').write_bytes(b'x'*400_000) # longer than the file: 416
    assert fetch(server, tmp_path/'g', md5(Server.content), wait=.01).read_bytes() == Server.content


def test_fetch_gives_up_with_the_reason(server, tmp_path):
    with pytest.raises(OSError, match='checksum'): fetch(server, tmp_path/'f', md5(b'other'), tries=2, wait=.01)
    assert not list(tmp_path.iterdir())
    Server.fail = 9
    with pytest.raises(OSError, match=r'503.*\(3 attempts\)'): fetch(server, tmp_path/'f', tries=3, wait=.01)
    Server.fail = 1
    assert fetch(server, tmp_path/'f', tries=2, wait=.01).exists()


def mnist_bytes(tmp_path):
    y = np.array([0]*2+[1]*3, np.uint8)[:, None]
    np.savez(tmp_path/'m.npz', **{f'{p}_{k}': v for p in ('train', 'val', 'test') for k, v in (('images', np.zeros((5, 28, 28), np.uint8)), ('labels', y))})
    return (tmp_path/'m.npz').read_bytes()


def test_download_medmnist(server, tmp_path, monkeypatch):
    Server.content = mnist_bytes(tmp_path)
    src = data.replace(data.DATASETS['pneumoniamnist'], url=server, md5=md5(Server.content), counts=dict(normal=6, pneumonia=9))
    monkeypatch.setitem(data.DATASETS, 'pneumoniamnist', src)
    path = download('pneumoniamnist', tmp_path/'d')
    assert read_images(path).counts() == {'normal': 6, 'pneumonia': 9} and json.loads((tmp_path/'d'/'pneumoniamnist.npz.sha256.json').read_text())
    asked = len(Server.asked); assert download('pneumoniamnist', tmp_path/'d') == path and len(Server.asked) == asked
    monkeypatch.setitem(data.DATASETS, 'pneumoniamnist', data.replace(src, url=server.replace('127.0.0.1', '127.0.0.1:1/x#'), md5='0'*32))
    monkeypatch.setattr(data.time, 'sleep', lambda s: None)
    with pytest.raises(OSError, match=r'By hand:(.|\n)*read_images'): download('pneumoniamnist', tmp_path/'d')


def test_download_kaggle_with_a_stand_in(tmp_path, monkeypatch):
    root, asked = tmp_path/'versions'/'2', []
    for c in ('NORMAL', 'PNEUMONIA'):
        for i in range(2): picture(root/'chest_xray'/'train'/c/f'{c}{i}.jpeg')
    hub = types.SimpleNamespace(dataset_download=lambda handle: asked.append(handle) or str(root))
    monkeypatch.setitem(sys.modules, 'kagglehub', hub)
    with pytest.warns(UserWarning, match='found .* expected'): assert download('chest_xray', tmp_path/'d') == root
    assert asked == ['paultimothymooney/chest-xray-pneumonia/versions/2'] and check_manifest(root) == 4
    (root/'chest_xray'/'train'/'NORMAL'/'NORMAL0.jpeg').write_bytes(b'other')
    with pytest.raises(ValueError, match='NORMAL0.jpeg has changed'): download('chest_xray', tmp_path/'d')
    def refuses(handle): raise RuntimeError('403 Forbidden')
    hub.dataset_download = refuses
    with pytest.raises(OSError, match=r'403 Forbidden(.|\n)*kaggle.com/datasets/paultimothymooney(.|\n)*unpack it to'): download('chest_xray', tmp_path/'d')
    monkeypatch.setitem(sys.modules, 'kagglehub', None)
    with pytest.raises(ImportError, match=r'cxr_gan\[download\](.|\n)*By hand'): download('chest_xray', tmp_path/'d')
    (tmp_path/'d').mkdir(); root.rename(tmp_path/'d'/'chest_xray')
    with pytest.warns(UserWarning, match='expected'): assert download('chest_xray', tmp_path/'d') == tmp_path/'d'/'chest_xray' # put there by hand


def test_manifest_that_cannot_be_written(tmp_path, monkeypatch):
    picture(tmp_path/'s'/'a.png')
    def no(*a): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(data, 'save_json', no)
    with pytest.warns(UserWarning, match='cannot be written'): assert check_manifest(tmp_path/'s') == 1


# ---- real films, where there are any

@pytest.mark.skipif(not os.environ.get('CXR_DATA'), reason='set CXR_DATA to a folder of real films')
def test_real_films():
    s = read_images(os.environ['CXR_DATA'], size=32, progress=False)
    train, test = split_set(s)
    assert s.n_classes > 1 and not set(train.groups) & set(test.groups) and str(s.card())
