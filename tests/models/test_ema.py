import torch

from unmask.models.ema import Ema


def test_average_follows_its_formula_with_warm_up() -> None:
    model = torch.nn.Linear(2, 2)
    ema = Ema(model, 0.9)
    expected = model.weight.detach().clone()
    for n in range(1, 200):
        with torch.no_grad():
            model.weight.add_(1.0)
        ema.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        assert torch.allclose(ema.shadow["weight"], expected, rtol=1e-5)


def test_applied_gives_the_models_own_weights_back() -> None:
    model = torch.nn.Linear(2, 2)
    ema = Ema(model, 0.9)
    with torch.no_grad():
        model.weight.fill_(7.0)
    with ema.apply():
        assert torch.equal(model.weight, ema.shadow["weight"])
    assert (model.weight == 7.0).all()


def test_state_dict_goes_on_exactly() -> None:
    model = torch.nn.Linear(2, 2)
    one = Ema(model, 0.99)
    one.update()
    other = Ema(torch.nn.Linear(2, 2), 0.99)
    other.load_state_dict(one.state_dict())
    assert other.num_updates == one.num_updates
    assert all(torch.equal(other.shadow[name], value) for name, value in one.shadow.items())


def test_tied_weights_are_averaged_under_each_of_their_names() -> None:
    """What a checkpoint lays over the model's own weights must hold all of them."""

    def make() -> torch.nn.Sequential:
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    model = make()
    ema = Ema(model, 0.9)
    with torch.no_grad():
        model[0].weight.fill_(7.0)
    ema.update()
    assert set(ema.state_dict()["shadow"]) == set(model.state_dict())
    loaded = make()
    loaded.load_state_dict(model.state_dict() | ema.state_dict()["shadow"])
    with ema.apply():
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
