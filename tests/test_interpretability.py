"""The chapter's maps against captum's, where captum is right: networks whose ReLUs are modules."""
import pytest
import torch
import torchvision
from torch.testing import assert_close

from cxr_gan.architectures import SmallCNN
from cxr_gan.core import set_seed, to_float
from cxr_gan.data import phantom_set
from cxr_gan.interpretability import deconvolution_rule, grad_cam, guided_backprop, guided_rule, input_gradient, integrated_gradients, occlusion

attr = pytest.importorskip('captum.attr')
pytestmark = pytest.mark.filterwarnings('ignore')

def networks():
    set_seed(0)
    resnet = torchvision.models.resnet18(weights=None, num_classes=3); resnet.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    return {'small': SmallCNN(3, 1, width=8), 'resnet18': resnet}

@pytest.fixture(scope='module', params=['small', 'resnet18'])
def case(request):
    return networks()[request.param].eval(), to_float(phantom_set(4, 64).images), torch.tensor([0, 1, 2, 1])

def test_gradients(case):
    net, x, y = case
    assert_close(input_gradient(net, x, y), attr.Saliency(net).attribute(x.clone().requires_grad_(), y, abs=False).detach())

@pytest.mark.parametrize('rule,name', [(guided_rule, 'GuidedBackprop'), (deconvolution_rule, 'Deconvolution')])
def test_rules(case, rule, name):
    net, x, y = case
    assert_close(input_gradient(net, x, y, rule), getattr(attr, name)(net).attribute(x.clone().requires_grad_(), y).detach())

def test_occlusion(case):
    net, x, y = case
    theirs = attr.Occlusion(net).attribute(x, sliding_window_shapes=(1, 16, 16), strides=(1, 8, 8), target=y, baselines=0.)
    assert_close(occlusion(net, x, y, patch=16, stride=8), theirs[:, 0], rtol=1e-3, atol=1e-5) # both average over the squares that cover a pixel

def test_grad_cam(case):
    net, x, y = case
    layer = net.layer4 if hasattr(net, 'layer4') else [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)][-1]
    theirs = attr.LayerGradCam(net, layer).attribute(x, y, relu_attributions=True)[:, 0].detach()
    assert_close(grad_cam(net, x, y, layer, full=False), theirs, rtol=1e-4, atol=1e-6)

def test_integrated_gradients(case):
    net, x, y = case
    theirs = attr.IntegratedGradients(net).attribute(x, baselines=-1., target=y, n_steps=32, method='riemann_middle')[:, 0].detach()
    assert_close(integrated_gradients(net, x, y, steps=32), theirs, rtol=1e-3, atol=1e-5)

def test_a_relu_that_is_called_is_found_here_and_missed_there():
    class Called(torch.nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.out = torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 4, 3), torch.nn.Linear(4, 3)
        def forward(self, x): return self.out(self.b(torch.relu(self.a(x))).relu().mean((2, 3)))
    set_seed(0); net, x = Called().eval(), to_float(phantom_set(2, 32).images)
    theirs = attr.GuidedBackprop(net).attribute(x.clone().requires_grad_(), 0).detach()
    assert_close(theirs, input_gradient(net, x, 0)) # the plain gradient, without a word
    assert not torch.allclose(theirs, input_gradient(net, x, 0, guided_rule))
    assert (guided_backprop(net, x, 0) > 0).any()
