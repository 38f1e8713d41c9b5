"Two processes: each draws its own noise, a resumed run is the uninterrupted one, and all stop together. Started by torchrun, this file is the program."
import subprocess, sys, time
from pathlib import Path

import torch
from fastai.callback.core import Callback

from cxr_gan.architectures import LeanDiscriminator, LeanGenerator
from cxr_gan.core import set_seed
from cxr_gan.data import phantom_set, resident_loaders
from cxr_gan.processes import join, launched, leave, one_first
from cxr_gan.training import Checkpoint, GANLearner, OptSettings

class AskedToStop(Callback):
    "The last process alone, after its third step, where a clock or a signal would ask."
    order = 72
    def after_batch(self):
        if join()[0] == launched()-1 and self.steps == 3: self.learn.stop = True

def fit(steps, cb, resume=None):
    "A new learner with batch norm, trained in all processes: the weights, and what its generator would make next."
    set_seed(0); opt = OptSettings(1e-3, (.5, .9), eps=1e-4)
    loaders = resident_loaders(phantom_set(64, 16), bs=16//launched(), device='cpu', drop_last=True)
    l = GANLearner(loaders, LeanGenerator(16, width=4), LeanDiscriminator(16, width=4), terms=dict(r1=1., lecam=.01), d_opt=opt, g_opt=opt, ema=.9)
    with l.no_bar(), l.no_logging(), l.distrib_ctx():
        if resume: l.load_checkpoint(resume)
        l.fit_for(steps=steps, cbs=cb)
    weights = torch.cat([p.detach().flatten() for p in l.model.state_dict().values()])
    return dict(steps=l.steps, weights=weights, fakes=l.make_fakes(4)[0].detach())

def program(folder):
    torch.set_num_threads(1); rank, world = join()
    with one_first():
        if rank == 0: time.sleep(.5) # slow, and still the first
        with open(f'{folder}/order', 'a') as f: f.write(str(rank))
    whole = fit(5, Checkpoint(f'{folder}/whole.safetensors', 2))
    fit(3, Checkpoint(f'{folder}/part.safetensors', 100))
    resumed = fit(5, [], f'{folder}/part.safetensors')
    torch.save(dict(whole=whole, resumed=resumed, stopped=fit(30, AskedToStop())['steps']), f'{folder}/{rank}.pt')
    leave()

def test_two_processes(tmp_path):
    command = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', __file__, str(tmp_path)]
    r = subprocess.run(command, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-3000:]
    a, b = (torch.load(tmp_path/f'{rank}.pt') for rank in (0, 1))
    assert (tmp_path/'order').read_text() == '01'
    for run in ('whole', 'resumed'): assert torch.equal(a[run]['weights'], b[run]['weights']), run
    for r in (a, b):
        for k in ('weights', 'fakes'): assert torch.equal(r['whole'][k], r['resumed'][k]), f'{k}: resumed as if not interrupted'
    assert not torch.equal(a['whole']['fakes'], b['whole']['fakes']), 'each with its own noise'
    assert [a['stopped'], b['stopped']] == [10, 10], 'at the next agreement'

if __name__ == '__main__': program(Path(sys.argv[1]))
