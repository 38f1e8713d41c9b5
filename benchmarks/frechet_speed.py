"""Speed and agreement of the distances against torch-fidelity's own, from features to number.

    python benchmarks/frechet_speed.py [--threads 2] [--repeat 3]

Times are the least of `repeat` runs, taken in turns; torch-fidelity's include its statistics (mean and covariance).
"""
import argparse, os, time

def _args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--repeat', type=int, default=5)
    return p.parse_args()

def features(n, d, seed):
    "Like the features of a network: not negative, correlated, with variances over four orders of magnitude."
    import torch
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(0))/d**.5*torch.logspace(0, -2, d)
    return (torch.randn(n, d, generator=g)@mix*(1+.1*seed)).abs()+.01*seed

def best(functions, repeat):
    "Least seconds and last value of each function, run in turns."
    seconds, values = [float('inf')]*len(functions), [None]*len(functions)
    for _ in range(repeat):
        for i, f in enumerate(functions):
            time.sleep(.5) # the other library's threads spin for a while after their work
            start = time.perf_counter()
            values[i] = f()
            seconds[i] = min(seconds[i], time.perf_counter()-start)
    return seconds, values

def main():
    a = _args()
    for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ[name] = str(a.threads)
    import torch
    torch.set_num_threads(a.threads)
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from cxr_gan.metrics import frechet_distance, kernel_distance
    print(f'{a.threads} threads, least of {a.repeat} runs\n{"":22s} {"torch-fidelity":>15s} {"here":>9s} {"ratio":>7s} {"relative gap":>13s}')
    for n, d in [(1000, 2048), (3000, 2048)]:
        x, y = features(n, d, 1), features(n, d, 2)
        pairs = {
            'FID': (lambda: fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), False)['frechet_inception_distance'], lambda: frechet_distance(x, y)),
            'KID': (lambda: kid_features_to_metric(x, y, kid_subsets=100, kid_subset_size=1000, verbose=False)['kernel_inception_distance_mean'], lambda: kernel_distance(x, y, 100, 1000)[0]),
        }
        for name, both in pairs.items():
            (t, u), (v, w) = best(both, a.repeat)
            print(f'{name} n={n} d={d:<8d} {t:13.2f} s {u:7.2f} s {t/u:6.1f}x {abs(v-w)/abs(v):13.1e}', flush=True)

if __name__ == '__main__': main()
