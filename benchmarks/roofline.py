"""How near a training step comes to what the device can do, what half precision, compilation and CUDA graphs are each worth, and where the rest goes.

    python benchmarks/roofline.py [recipe ...] [--device cpu] [--size 128] [--bs 64] [--width-share 1] [--blocks 5] [--steps 6] [--threads 1]
                                  [--variants float32 amp ...] [--numeric-steps 50] [--minutes 4.5] [--out FILE]

`rates`: the device itself, best of several sizes: large matrix products and 3x3 convolutions (multiply and add are two operations; the better one counts),
and copy or axpy far beyond its caches.
`roofline`, for each recipe and precision: operations of one whole step (forward, backward, penalties; counted by torch's FlopCounterMode) and the bytes that
its layers must move at least. A layer's call moves its input, output and weights in the type it runs in: a layer that multiplies three times (forward, slope
of the input, slope of the weights), any other twice (forward, slope); Adam moves 28 bytes a weight (weight and both moments read and written, gradient read).
A layer's time is at least max(operations/matrix rate, bytes/bandwidth), each layer's forward operations scaled by (whole step)/(forward); `bound` is their
sum and `share` = bound/time. `bound_fused` leaves out the bytes of the layers that do not multiply, as if all of them were fused into their neighbours: a
compiled step is to be held against this. Neither knows of caches (small layers find their films there) nor of Winograd (fewer operations): both could lift a
share above one; concatenation, resizing and copies between layers are left out of both.
`rows`: `ratio` is the time of step_speed's textbook loop (float32, always) over ours, median of --blocks pairs of blocks of --steps steps in alternation;
`ratio_without` without the textbook's reading of files. `first` is the first step, compilation included (less what the compiler's cache on disk holds);
`memory` the peak of the steps after it, above what was there before, in GB (resident films included; on a CPU the resident set, compiler included). On a CPU
`cpu_seconds` is the processor time of a step of ours, by thread: other programs lengthen `seconds`, not this one, so the shares are taken of the lesser.
`profile`: operators (on a GPU kernels too) by their own time; `idle` = 1 - (time in kernels)/(time of a step without the profiler).
`numerics`: how far the losses of cgan without dropout (a compiled one draws other numbers) are from float32's, with the same start and the same draws, over
--numeric-steps steps and at the first, which is rounding alone: later ones have grown as they do in any GAN. `float32` is a second run of the same. On a GPU
float32 means TF32 in the convolutions."""
import argparse, ctypes, gc, math, platform, re, signal, statistics, tempfile, time, warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from fastai.callback.core import Callback
from step_speed import Textbook, Turns, check, clock, fit, write_films
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from cxr_gan.core import save_json, set_seed
from cxr_gan.data import read_images
from cxr_gan.recipes import RECIPES, learner, recipe
from cxr_gan.training import half

OUT = Path(__file__).resolve().parent.parent/'nbs'/'results'
GRAPHS = dict(mode='reduce-overhead')
VARIANTS = {'float32': (False, None), 'amp': (True, None), 'amp+compile': (True, {}), 'amp+graphs': (True, GRAPHS), 'compile': (False, {}), 'graphs': (False, GRAPHS)} # name -> autocast, arguments of torch.compile
EAGER, COMPILED, NUMERIC = ('float32', 'amp'), ('amp+compile', 'amp+graphs', 'compile'), ('float32', 'amp', 'compile', 'graphs')


def is_cuda(device): return str(device).startswith('cuda')
def quietly(l, steps): return fit(l, steps, Callback())


def short(v):
    "The same with five digits, and None for what JSON has no number for."
    if isinstance(v, dict): return {k: short(x) for k, x in v.items()}
    if isinstance(v, (list, tuple)): return [short(x) for x in v]
    return v if not isinstance(v, float) else float(f'{v:.5g}') if math.isfinite(v) else None


def where(a):
    "The device in words."
    if is_cuda(a.device): return torch.cuda.get_device_name(a.device)
    info = Path('/proc/cpuinfo')
    found = info.exists() and re.search(r'model name\s*: (.*)', info.read_text())
    return f"{found[1] if found else platform.processor()}, {a.threads} thread{'s'*(a.threads > 1)}, {torch.backends.cpu.get_cpu_capability()}"


def fastest(f, device, seconds=.4):
    "Seconds of the fastest call."
    f(); best, end, n = math.inf, time.monotonic()+seconds, 0
    while n < 3 or time.monotonic() < end: t = clock(device); f(); best, n = min(best, clock(device)-t), n+1
    return best


def measured_rates(a):
    "What the device can do: operations a second by type, bytes a second."
    dev, cuda = torch.device(a.device), is_cuda(a.device)
    def product(dtype, n): x, y = torch.randn(2, n, n, device=dev).to(dtype); return 2*n**3/fastest(lambda: x@y, dev)
    def products(dtype): return max(product(dtype, n) for n in ((4096, 8192, 12288) if cuda else (256, 512, 1024)))
    @torch.no_grad()
    def convolution(dtype, n, c, side):
        x, w = (torch.randn(*shape, device=dev).to(dtype, memory_format=torch.channels_last) for shape in ((n, c, side, side), (c, c, 3, 3)))
        return 18*c*c*x[:, 0].numel()/fastest(lambda: torch.conv2d(x, w, padding=1), dev)
    def convolutions(dtype): return max(convolution(dtype, *how) for how in (((64, 512, 32), (64, 1024, 16)) if cuda else ((8, 64, 16), (8, 64, 32), (8, 128, 32)))) # short calls: other programs come between
    was, kind, full = torch.get_float32_matmul_precision(), half(dev), 'tf32' if cuda and torch.backends.cudnn.allow_tf32 else 'float32'
    found = {}
    try:
        for name, how in (('float32', 'highest'), ('tf32', 'high'))[:1+cuda]: torch.set_float32_matmul_precision(how); found[name] = products(torch.float32)
    finally: torch.set_float32_matmul_precision(was)
    found.update({f'{full} convolution': convolutions(torch.float32), 'half': products(kind), 'half convolution': convolutions(kind)})
    x, y = torch.ones(2, 2**28 if cuda else 2**25, device=dev)
    return dict(found, bytes=max(8*len(x)/fastest(lambda: y.copy_(x), dev), 12*len(x)/fastest(lambda: y.add_(x, alpha=.5), dev)))


def matrix_rate(rates, amp):
    "The rate that a precision can hope for, convolutions in float32 being TF32 where cuDNN may."
    full = 'tf32' if 'tf32 convolution' in rates else 'float32'
    return max(rates[k] for k in (full, f'{full} convolution', *(('half', 'half convolution') if amp else ())))


def shrunk(name, a, amp=False): return recipe(name, width=max(4, round(RECIPES[name].width*a.width_share)), bs=a.bs, amp=amp)


def make(name, variant, a, films):
    "A learner of ours."
    amp, compiled = VARIANTS[variant]
    return learner(shrunk(name, a, amp), films, a.size, device=a.device, **({} if compiled is None else dict(compile=compiled)))


@contextmanager
def watched(model, counter, device):
    "Inside the block each call of a layer leaves its forward operations and the bytes of its input, output and weights under its name."
    calls, start, handles = {}, {}, []
    kind = torch.device(device).type
    def size(t, multiplies): return t.numel()*(min(t.element_size(), torch.get_autocast_dtype(kind).itemsize) if multiplies and t.is_floating_point() and torch.is_autocast_enabled(kind) else t.element_size())
    for name, m in model.named_modules():
        if [*m.children()]: continue
        def before(m, args, name=name): start[name] = counter.get_total_flops()
        def after(m, args, out, name=name):
            ops = counter.get_total_flops()-start[name]
            calls.setdefault(name, []).append((ops, sum(size(t, ops > 0) for t in (*args, out, *m.parameters()) if isinstance(t, torch.Tensor))))
        handles += [m.register_forward_pre_hook(before), m.register_forward_hook(after)]
    try: yield calls
    finally:
        for h in handles: h.remove()


def roofline(name, amp, a, films, rates):
    "Operations, bytes and the least time of one step."
    l = make(name, 'amp' if amp else 'float32', a, films)
    with FlopCounterMode(display=False) as counter, watched(l.model, counter, a.device) as calls: quietly(l, 1)
    total, forward = counter.get_total_flops(), sum(ops for c in calls.values() for ops, _ in c)
    rate, adam = matrix_rate(rates, amp), 28*sum(p.numel() for p in l.model.parameters() if p.requires_grad)
    layers, fused = [], 0.
    for layer, c in calls.items():
        ops, moved = (sum(v) for v in zip(*[(o*total/forward, b*(3 if o else 2)) for o, b in c]))
        by = [(o*total/forward/rate, b*(3 if o else 2)/rates['bytes']) for o, b in c]
        layers.append(dict(layer=layer, calls=len(c), gflop=ops/1e9, mb=moved/1e6, ms=1e3*sum(map(max, by)), limit='bytes' if by[-1][1] > by[-1][0] else 'operations'))
        if ops: fused += sum(map(max, by))
    bound = sum(v['ms'] for v in layers)/1e3+adam/rates['bytes']
    return dict(tflop=total/1e12, step_over_forward=total/forward, gbytes=(adam+sum(v['mb'] for v in layers)*1e6)/1e9, gbytes_optimiser=adam/1e9, matrix_rate=rate, bound=bound, bound_fused=fused+adam/rates['bytes'],
        bound_operations=total/rate, bound_by_bytes=sum(v['ms'] for v in layers if v['limit'] == 'bytes')/1e3+adam/rates['bytes'], weights=adam//28, layers=sorted(layers, key=lambda v: -v['ms'])[:10])


def memory(a, reset=False):
    "Peak bytes since the last reset, or, with `reset`, what is there now."
    if is_cuda(a.device):
        if not reset: return torch.cuda.max_memory_allocated(a.device)
        torch.cuda.reset_peak_memory_stats(a.device); return torch.cuda.memory_allocated(a.device)
    status = Path('/proc/self/status')
    if not status.exists(): return math.nan
    if reset:
        if hasattr(libc := ctypes.CDLL(None), 'malloc_trim'): libc.malloc_trim(0) # what was freed goes back
        Path('/proc/self/clear_refs').write_text('5')
    return 1024*int(re.search(rf"Vm{'RSS' if reset else 'HWM'}:\s+(\d+)", status.read_text())[1])


def where_time_goes(l, a, seconds, n=3):
    "The operators with the largest share of the time, and on a GPU the kernels, and how long it idles."
    cuda = is_cuda(a.device)
    with profile(activities=[ProfilerActivity.CPU]+[ProfilerActivity.CUDA]*cuda) as p: quietly(l, l.steps+n); clock(torch.device(a.device))
    events = p.key_averages()
    def top(found, key):
        total = sum(getattr(e, key) for e in found) or 1
        return [dict(name=e.key[:90], ms=getattr(e, key)/1e3/n, share=getattr(e, key)/total, calls=e.count/n) for e in sorted(found, key=lambda e: -getattr(e, key))[:8] if getattr(e, key)]
    ops = [e for e in events if e.device_type == DeviceType.CPU]
    if not cuda: return dict(operators=top(ops, 'self_cpu_time_total'))
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, 'is_user_annotation', False)]
    busy = sum(e.self_device_time_total for e in kernels)/1e6/n
    return dict(operators=top(ops, 'self_device_time_total'), kernels=top(kernels, 'self_device_time_total'), kernel_seconds=busy, launches=sum(e.count for e in kernels)/n, idle=1-busy/seconds)


def textbook_row(book, a):
    "The textbook alone: its operations and memory, and that it does the same as ours."
    with FlopCounterMode(display=False) as counter: book.run(1)
    base = memory(a, reset=True)-16*sum(p.numel() for p in (*book.d.parameters(), *book.g.parameters())); book.run(2); peak = memory(a) # weights, gradients, moments
    t, before = clock(book.device), book.read
    book.run(a.steps)
    took, reading = (clock(book.device)-t)/a.steps, (book.read-before)/a.steps
    return dict(seconds=took, reading=reading, images_s=a.bs/took, tflop_s=counter.get_total_flops()/1e12/took, tflop=counter.get_total_flops()/1e12, memory=(peak-base)/1e9)


def row(name, variant, a, films, book, roof):
    "One variant of ours beside the textbook."
    dev, base = torch.device(a.device), memory(a, reset=True)
    l, warm = make(name, variant, a, films), a.steps*math.ceil(5/a.steps)
    t = clock(dev); quietly(l, 1); first = clock(dev)-t
    memory(a, reset=True); quietly(l, warm); peak = memory(a)-base
    turns = fit(l, warm+(a.blocks+1)*a.steps, Turns(book, a.blocks+1, a.steps))
    own = {}
    if not is_cuda(a.device): cpu = time.process_time(); quietly(l, l.steps+2*a.steps); own = dict(cpu_seconds=(time.process_time()-cpu)/(2*a.steps)/a.threads)
    pairs = list(zip(turns.ours, turns.theirs, turns.reading))[1:] # the first pair warms up
    ours, theirs, reading = (statistics.median(v) for v in zip(*pairs))
    took = min(ours, own.get('cpu_seconds', ours))
    ratios, without = [b/o for o, b, _ in pairs], [(b-read)/o for o, b, read in pairs]
    assert all(map(math.isfinite, l.curves()['d_loss'])), 'the losses are not finite'
    return dict(seconds=ours, least=min(turns.ours[1:]), most=max(turns.ours[1:]), steps_s=1/ours, images_s=a.bs/ours, tflop_s=roof['tflop']/ours, share_matrix=roof['bound_operations']/took, share=roof['bound']/took,
        share_fused=roof['bound_fused']/took, memory=peak/1e9, first=first, textbook=theirs, reading=reading, ratio=statistics.median(ratios), ratio_least=min(ratios), ratio_most=max(ratios),
        ratio_without=statistics.median(without), **own, profile=where_time_goes(l, a, ours))


def losses(variant, a, films):
    "Both losses of a run without dropout."
    l = make('cgan', variant, a, films)
    for m in l.model.modules():
        if 'Dropout' in type(m).__name__: m.p = 0.
    quietly(l, a.numeric_steps)
    return {k: torch.from_numpy(l.curves()[k]).double() for k in ('d_loss', 'g_loss')}


def apart(found, reference):
    "How far two runs' losses are from each other."
    diffs = {k: (found[k]-reference[k]).abs() for k in reference}
    return {k: dict(max=float(d.max()), mean=float(d.mean()), first=float(d[0]), half_way=float(d[len(d)//2]), last=float(d[-1]), size=float(reference[k].abs().mean())) for k, d in diffs.items()}


class Bench:
    "The measurements in the order of their worth, each of which may fail without harm to the others."
    def __init__(self, a, films):
        self.a, self.films, self.books, self.reference = a, films, {}, None
        plain = {k: v for k, v in vars(a).items() if k != 'out'}
        nets = {k: dict(width=(r := shrunk(k, a)).width, uncertainty=r.uncertainty and dict(r.uncertainty, T=r.uncertainty.get('T', 4)), d_args=r.d_args) for k in a.recipes}
        cudnn = {k: getattr(torch.backends.cudnn, k) for k in ('allow_tf32', 'benchmark')}
        self.out = dict(settings=plain, recipes=nets, device=where(a), torch=torch.__version__, cudnn=cudnn, rates={}, roofline=[], rows=[], numerics=[])

    def jobs(self):
        "(where it goes, what it is, the measurement)."
        a, graphs = self.a, is_cuda(self.a.device)
        def rows(variants): return [('rows', dict(recipe=n, variant=v), self.row) for n in a.recipes for v in variants if v in a.variants and ('graphs' not in v or graphs)]
        def numerics(variants): return [('numerics', dict(variant=v), self.numerics) for v in variants if a.numeric_steps and ('graphs' not in v or graphs)]
        roofs = [('roofline', dict(recipe=n, amp=amp), self.roofline) for n in a.recipes for amp in (False, True)]
        books = [('rows', dict(recipe=n, variant='textbook'), self.textbook) for n in a.recipes]
        return [*roofs, *books, *rows(EAGER), *numerics(NUMERIC[:2]), *rows(COMPILED[:2]), *numerics(NUMERIC[2:] if {*COMPILED} & {*a.variants} else ()), *rows(COMPILED[2:])]

    def roofline(self, recipe, amp): return roofline(recipe, amp, self.a, self.films, self.out['rates'])
    def book(self, name):
        "The textbook of a recipe, made once."
        if name not in self.books: self.books[name] = Textbook(make(name, 'float32', self.a, self.films))
        return self.books[name]
    def textbook(self, recipe, variant):
        "Alone, and checked."
        try: check(shrunk(recipe, self.a), self.films, self.a); found = 'same losses'
        except AssertionError as e: found = str(e)
        return dict(textbook_row(self.book(recipe), self.a), check=found)
    def row(self, recipe, variant):
        "A variant's."
        roof = next(v for v in self.out['roofline'] if (v['recipe'], v['amp']) == (recipe, VARIANTS[variant][0]))
        return row(recipe, variant, self.a, self.films, self.book(recipe), roof)
    def numerics(self, variant):
        "Against float32."
        if self.reference is None: self.reference = losses('float32', self.a, self.films)
        return apart(losses(variant, self.a, self.films), self.reference)

    def save(self): save_json(self.out, self.a.out)

    def run(self, end):
        "All of it until `end`."
        self.out['rates'] = short(measured_rates(self.a)); self.save()
        print(', '.join(f"{k} {v/1e12:.3f} TFLOP/s" if k != 'bytes' else f'{v/1e9:.1f} GB/s' for k, v in self.out['rates'].items()), flush=True)
        for section, key, job in self.jobs():
            try:
                if time.monotonic() > end: raise TimeoutError('out of time')
                found = job(**key)
            except Exception as e: found = dict(error=first_line(e))
            self.out[section].append(short({**key, **found})); self.save()
            print(line(section, key, found), flush=True)
            gc.collect(); torch._dynamo.reset(); gc.collect()
            if is_cuda(self.a.device): torch.cuda.empty_cache()


def first_line(e):
    "An error in one line."
    lines = [s.strip() for s in str(e).splitlines() if s.strip()] or ['']
    return f"{type(e).__name__}: {' '.join(lines[:1+lines[0].endswith(':')])}"[:300]


def line(section, key, v):
    "What was found, as text."
    head = f"{section:9}{' '.join(str(k) for k in key.values()):22}"
    if 'error' in v: return head+v['error']
    if section == 'roofline': return head+f"{v['tflop']:.5f} TFLOP ({v['step_over_forward']:.2f} times forward), {v['gbytes']:.3f} GB, bound {v['bound']:.5f} s, fused {v['bound_fused']:.5f} s, operations alone {v['bound_operations']:.5f} s"
    if section == 'numerics': return head+', '.join(f"{k} of {d['size']:.3f} off by {d['max']:.2g} at most, {d['mean']:.2g} in the mean, {d['first']:.2g} at first" for k, d in v.items())
    if key['variant'] == 'textbook': return head+f"{v['seconds']:.4f} s ({v['reading']:.4f} reading), {v['images_s']:.1f} images/s, {v['tflop_s']:.4f} TFLOP/s of {v['tflop']:.5f} a step, {v['memory']:.3f} GB; {v['check']}"
    idle = f", idle {v['profile']['idle']:.2f}" if 'idle' in v['profile'] else f", {v['cpu_seconds']:.4f} s of processor"
    return head+(f"{v['seconds']:.4f} s ({v['least']:.4f} to {v['most']:.4f}), {v['steps_s']:.2f} steps/s, {v['images_s']:.1f} images/s, {v['tflop_s']:.4f} TFLOP/s, share {v['share']:.3f} (fused {v['share_fused']:.3f}, matrix {v['share_matrix']:.3f}), "
        f"textbook/ours {v['ratio']:.2f} ({v['ratio_least']:.2f} to {v['ratio_most']:.2f}; without reading {v['ratio_without']:.2f}), {v['memory']:.3f} GB, first step {v['first']:.1f} s{idle}")


def parse():
    "The command line."
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('recipes', nargs='*', default=['cgan', 'cgan_max'], metavar='recipe', help='names of RECIPES')
    a.add_argument('--device', default='cpu', help='cpu or cuda'); a.add_argument('--threads', type=int, default=1)
    a.add_argument('--size', type=int, default=128); a.add_argument('--bs', type=int, default=64)
    a.add_argument('--width-share', type=float, default=1., help="share of the recipe's width; at least 4 remain")
    a.add_argument('--blocks', type=int, default=5); a.add_argument('--steps', type=int, default=6, help='steps in a block')
    a.add_argument('--variants', nargs='+', default=[*EAGER, *COMPILED], choices=VARIANTS, metavar='variant', help='graphs are left out on a CPU')
    a.add_argument('--numeric-steps', type=int, default=50, help='0 for no numerics'); a.add_argument('--minutes', type=float, default=4.5)
    a.add_argument('--label', default='', help='kept in the file, e.g. what else the machine was doing'); a.add_argument('--out', type=Path)
    found = a.parse_args()
    if unknown := [n for n in found.recipes if n not in RECIPES]: a.error(f"no recipe {', '.join(unknown)}; known: {', '.join(RECIPES)}")
    found.out = found.out or OUT/f"roofline_{'cuda' if is_cuda(found.device) else 'cpu'}.json"
    return found


def main():
    a = parse()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(a.threads); set_seed(0)
    end = time.monotonic()+60*a.minutes
    def late(*_): raise TimeoutError('out of time')
    signal.signal(signal.SIGALRM, late); signal.setitimer(signal.ITIMER_REAL, 60*a.minutes)
    with tempfile.TemporaryDirectory() as d:
        write_films(Path(d), 2*a.bs, 2*a.size)
        films = read_images(d, size=a.size, cache=False, progress=False)
        bench = Bench(a, films[[i % len(films) for i in range(54*a.bs)]]) # as many batches in an epoch as S0's films make
        print(f"{a.size} px, batches of {a.bs}, {a.width_share:g} of the width, {bench.out['device']}, torch {torch.__version__}", flush=True)
        bench.run(end)
    signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == '__main__': main()
