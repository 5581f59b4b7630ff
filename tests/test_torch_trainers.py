"""Trainers take the optimizers of lookstep.torch as torch's own, and resume within a cycle bit for bit."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint import state_dict as dsd  # noqa: E402

import lookstep as ls  # noqa: E402
from lookstep.torch import Lookahead, Optimizer  # noqa: E402

OPTIMIZERS = {
    "lookahead": lambda params: Lookahead(torch.optim.AdamW(params, lr=0.1), 3, 0.3),
    "lookahead-of-sgd": lambda params: Lookahead(torch.optim.SGD(params, lr=0.1), 3, 0.3),
    "lookahead-pullback": lambda params: Lookahead(torch.optim.AdamW(params, lr=0.1), 3, 0.3, inner_state="pullback"),
    "lookahead-reset": lambda params: Lookahead(torch.optim.AdamW(params, lr=0.1), 3, 0.3, inner_state="reset"),
    "compiled": lambda params: Optimizer(params, ls.Lookahead(ls.AdamW(lr=0.1), 3, 0.3)),
    "compiled-plain": lambda params: Optimizer(params, ls.RAdam(lr=0.1)),
    "compiled-pullback": lambda params: Optimizer(
        params, ls.Lookahead(ls.NAdam(lr=0.1), 3, 0.3, inner_state="pullback")
    ),
    "compiled-reset": lambda params: Optimizer(params, ls.Lookahead(ls.AdamW(lr=0.1), 3, 0.3, inner_state="reset")),
}
"""How to make an optimizer with cycles of three steps."""
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
wrappers = pytest.mark.parametrize("make", list(OPTIMIZERS.values())[:4], ids=list(OPTIMIZERS)[:4])
at_any_step_of_a_cycle = pytest.mark.parametrize("at", [3, 4, 5])
"""After how many of seven steps the run is stopped."""
STEPS = 7


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))


def batches():
    x = torch.randn(2 * STEPS, 4, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))


def bits(model):
    return [p.detach().numpy().tobytes() for p in model.parameters()]


def by_hand(make, steps=STEPS):
    """The weights of the run that was never stopped, without a trainer."""
    model = network()
    opt = make(model.parameters())
    for x, y in torch.utils.data.DataLoader(batches(), batch_size=2):
        if steps == 0:
            break
        steps -= 1
        opt.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        opt.step()
    return bits(model)


def learn(model, opt, data):
    for x, y in data:
        opt.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        opt.step()


# Torch's own distributed checkpoints


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flat", [False, True])
@at_any_step_of_a_cycle
@every_optimizer
def test_distributed_checkpoints_resume(make, at, flat, tmp_path):
    options = dsd.StateDictOptions(flatten_optimizer_state_dict=flat)
    data = list(torch.utils.data.DataLoader(batches(), batch_size=2))
    model = network()
    opt = make(model.parameters())
    learn(model, opt, data[:at])
    opt.zero_grad()
    state = {"model": model.state_dict(), "optim": dsd.get_optimizer_state_dict(model, opt, options=options)}
    dcp.save(state, checkpoint_id=tmp_path)
    other = network(seed=2)
    again = make(other.parameters())
    state = {"model": other.state_dict(), "optim": dsd.get_optimizer_state_dict(other, again, options=options)}
    dcp.load(state, checkpoint_id=tmp_path)
    dsd.set_state_dict(other, again, model_state_dict=state["model"], optim_state_dict=state["optim"], options=options)
    for run in ((model, opt), (other, again)):
        learn(*run, data[at:])
    assert bits(other) == bits(model) == by_hand(make)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@wrappers
def test_sharded_parameters_are_stepped_and_resume(make, one_process, tmp_path):
    data = list(torch.utils.data.DataLoader(batches(), batch_size=2))
    runs = []
    for seed in (0, 2):
        model = network(seed)
        torch.distributed.fsdp.fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        runs.append((model, make(model.parameters())))
    (model, opt), (other, again) = runs
    learn(model, opt, data[:4])
    opt.zero_grad()
    weights, state = dsd.get_state_dict(model, opt)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=tmp_path)
    weights, state = dsd.get_state_dict(other, again)
    dcp.load({"model": weights, "optim": state}, checkpoint_id=tmp_path)
    dsd.set_state_dict(other, again, model_state_dict=weights, optim_state_dict=state)
    learn(other, again, data[4:])
    assert [p.full_tensor().detach().numpy().tobytes() for p in other.parameters()] == by_hand(make)


def test_sharded_parameters_are_refused_where_they_cannot_be_stepped(one_process):
    model = network()
    torch.distributed.fsdp.fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError, match=r'params\["0/0"\] is a DTensor.*use lookstep.torch.Lookahead'):
        Optimizer(model.parameters(), ls.SGD())


# Accelerate


def accelerated(make, seed=0, steps_of_one=1):
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps_of_one)
    model = network(seed)
    opt = make(model.parameters())
    data = torch.utils.data.DataLoader(batches(), batch_size=2 // steps_of_one)
    scheduler = torch.optim.lr_scheduler.ConstantLR(opt, 1.0)
    return accelerator, *accelerator.prepare(model, opt, data, scheduler)


def learn_accelerated(accelerator, model, opt, data, scheduler, stop=None):
    for i, (x, y) in enumerate(data):
        if i == stop:
            break
        with accelerator.accumulate(model):
            accelerator.backward(torch.nn.functional.mse_loss(model(x), y))
            opt.step()
            scheduler.step()
            opt.zero_grad()


@at_any_step_of_a_cycle
@every_optimizer
def test_accelerate_resumes(make, at, tmp_path):
    run = accelerated(make)
    learn_accelerated(*run, stop=at)
    run[0].save_state(tmp_path)
    accelerator, model, opt, data, scheduler = accelerated(make, seed=2)
    accelerator.load_state(tmp_path)
    learn_accelerated(accelerator, model, opt, accelerator.skip_first_batches(data, at), scheduler)
    assert bits(model) == by_hand(make)


@every_optimizer
def test_accelerate_accumulates_gradients_into_one_step(make):
    run = accelerated(make, steps_of_one=2)
    learn_accelerated(*run)
    for p, exact in zip(run[1].parameters(), by_hand(make), strict=True):
        torch.testing.assert_close(p.detach().flatten(), torch.frombuffer(bytearray(exact), dtype=torch.float32))


# Lightning


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning", reason="Lightning is not installed")


def trainer(lightning, folder, stop):
    return lightning.Trainer(
        accelerator="cpu",
        max_steps=stop,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def fit(lightning, make, folder, stop, resume=None, seed=0):
    data = list(torch.utils.data.DataLoader(batches(), batch_size=2))

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network(seed)

        def training_step(self, batch, index):
            # Lightning begins an epoch anew that a checkpoint is from the middle of.
            x, y = data[self.global_step]
            return torch.nn.functional.mse_loss(self.network(x), y)

        def configure_optimizers(self):
            opt = make(self.parameters())
            return {"optimizer": opt, "lr_scheduler": torch.optim.lr_scheduler.ConstantLR(opt, 1.0)}

    module, training = Module(), trainer(lightning, folder, stop)
    training.fit(module, torch.utils.data.DataLoader(range(STEPS)), ckpt_path=resume)
    training.save_checkpoint(folder / "run.ckpt")
    return module


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
@at_any_step_of_a_cycle
@every_optimizer
def test_lightning_resumes(lightning, make, at, tmp_path):
    fit(lightning, make, tmp_path, at)
    module = fit(lightning, make, tmp_path, STEPS, tmp_path / "run.ckpt", seed=2)
    assert bits(module) == by_hand(make)


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize("make", [OPTIMIZERS["lookahead"], OPTIMIZERS["compiled"]], ids=["lookahead", "compiled"])
def test_what_lightning_passes_for_the_optimizer_shows_slow_weights(lightning, make, tmp_path):
    seen = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()
            self.automatic_optimization = False

        def training_step(self, batch, index):
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(self.network(torch.ones(4)).sum())
            opt.step()
            with opt.slow_weights():
                seen.append((opt.steps, bits(self)))
                with pytest.raises(RuntimeError, match="slow weights"):
                    opt.step()

        def configure_optimizers(self):
            return make(self.parameters())

    start = bits(network())
    trainer(lightning, tmp_path, 4).fit(Module(), torch.utils.data.DataLoader(range(STEPS)))
    assert [steps for steps, _ in seen] == [1, 2, 3, 4]
    assert [slow == start for _, slow in seen] == [True, True, False, False]
    assert seen[2][1] == seen[3][1]


# Hugging Face's Trainer


@every_optimizer
def test_the_trainer_of_hugging_face_resumes(make, tmp_path):
    at = 4
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    config = transformers.GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=1)

    def train(stop, resume=None, seed=0):
        torch.manual_seed(seed)
        model = transformers.GPT2LMHeadModel(config)
        opt = make(model.parameters())
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                output_dir=tmp_path,
                max_steps=STEPS,
                save_steps=at,
                per_device_train_batch_size=2,
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
                logging_strategy="no",
                dataloader_pin_memory=False,
            ),
            train_dataset=[{"input_ids": ids, "labels": ids} for ids in torch.arange(4 * 14).reshape(14, 4) % 8],
            optimizers=(opt, torch.optim.lr_scheduler.ConstantLR(opt, 1.0)),
        )
        trainer.train(resume_from_checkpoint=resume)
        return bits(model)

    whole = train(STEPS)
    assert whole == train(STEPS, str(tmp_path / f"checkpoint-{at}"), seed=2)
