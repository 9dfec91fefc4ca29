"""Small models of the shapes met in other people's projects, written without em_lightning."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset


@dataclasses.dataclass
class Project:
    """A model, its data, and the arguments of the callbacks that a user would write for it."""

    build: Callable[[], lightning.LightningModule]
    data: Callable[[], Any]
    swap: dict[str, Any]
    insert: dict[str, Any]
    layers: dict[str, Any]
    em: str = "cross-entropy"  # an operation that the audit must find in the plain model
    weights_only: bool | None = None


PROJECTS: dict[str, Project] = {}


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(limit, *shape, seed=2):
    return torch.randint(limit, shape, generator=torch.Generator().manual_seed(seed))


def loader(*tensors, batch_size=8):
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size)


class Base(lightning.LightningModule):
    """A training step that returns the loss; test and predict call the forward."""

    def inputs(self, batch):
        return batch[0]

    def loss(self, batch):
        return F.cross_entropy(self(self.inputs(batch)), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss, batch_size=4)
        return loss

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch), batch_size=4)

    def predict_step(self, batch, batch_idx):
        return self(self.inputs(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def mlp(*widths):
    layers = []
    for before, after in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Autoencoder(Base):
    """An encoder and a decoder with hyperparameters, as a LightningCLI builds it."""

    def __init__(self, width: int = 16, code: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.encoder, self.decoder = mlp(8, width, code), mlp(code, width, 8)

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def loss(self, batch):
        return F.mse_loss(self(batch[0]), batch[0])


PROJECTS["autoencoder"] = Project(
    Autoencoder,
    lambda: loader(normal(16, 8)),
    swap={"where": "encoder.*"},
    insert={"where": "encoder.2", "num_components": 2},
    layers={"where": "encoder.1"},
    em="",
)


class Gan(Base):
    """Manual optimization with two optimizers, schedulers and ``toggle_optimizer``."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = mlp(2, 8, 6), mlp(6, 8, 1)

    def forward(self, noise):
        return self.generator(noise)

    def inputs(self, batch):
        return batch[0][:, :2]

    def training_step(self, batch, batch_idx):
        (real,) = batch
        first, second = self.optimizers()
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        self.toggle_optimizer(first)
        loss = F.binary_cross_entropy_with_logits(self.discriminator(self(torch.randn(len(real), 2))), ones)
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        fake = self(torch.randn(len(real), 2)).detach()
        loss = F.binary_cross_entropy_with_logits(self.discriminator(real), ones)
        loss = loss + F.binary_cross_entropy_with_logits(self.discriminator(fake), zeros)
        second.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(second, gradient_clip_val=1.0)
        second.step()
        self.untoggle_optimizer(second)
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.log("discriminator_loss", loss)

    def test_step(self, batch, batch_idx):
        self.log("test_score", self.discriminator(batch[0]).mean())

    def configure_optimizers(self):
        optimizers = [torch.optim.Adam(part.parameters(), 1e-2) for part in (self.generator, self.discriminator)]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(one, 0.9) for one in optimizers]


PROJECTS["gan"] = Project(
    Gan,
    lambda: loader(normal(16, 6)),
    swap={"where": "discriminator.*"},
    insert={"where": ["generator.0", "discriminator.0"], "num_components": 2},
    layers={"where": ["generator.1", "discriminator.1"], "weight": 0.1},
    em="",
)


class Corridor:
    """An environment of five places; the last one is rewarded."""

    def __init__(self):
        self.place = 0
        self.steps = 0

    def reset(self):
        self.place = self.steps = 0
        return F.one_hot(torch.tensor(self.place), 5).float()

    def step(self, action):
        self.place = min(max(self.place + (1 if action else -1), 0), 4)
        self.steps += 1
        return F.one_hot(torch.tensor(self.place), 5).float(), float(self.place == 4), self.steps == 6


class Dqn(Base):
    """A target network whose weights are copied inside the step; the policy acts under ``no_grad``."""

    def __init__(self):
        super().__init__()
        self.environment = Corridor()
        self.policy, self.target = mlp(5, 8, 2), mlp(5, 8, 2)
        self.target.load_state_dict(self.policy.state_dict())
        self.episodes = 0

    def forward(self, x):
        return self.policy(x)

    def loss(self, batch):
        state, replay = self.environment.reset(), []
        for _ in range(6):
            with torch.no_grad():
                action = self(state[None]).argmax() if torch.rand(()) > 0.3 else torch.randint(2, ())
            following, reward, done = self.environment.step(action)
            replay.append((state, action, reward, following, done))
            state = following
        self.episodes += 1
        states, actions, rewards, following, done = zip(*replay, strict=True)
        values = self(torch.stack(states)).gather(1, torch.stack(actions)[:, None])[:, 0]
        with torch.no_grad():
            best = self.target(torch.stack(following)).max(1).values
        return F.smooth_l1_loss(values, torch.tensor(rewards) + 0.9 * best * ~torch.tensor(done))

    def training_step(self, batch, batch_idx):
        if batch_idx % 2 == 0:
            self.target.load_state_dict(self.policy.state_dict())
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.Adam(self.policy.parameters(), lr=1e-2)


PROJECTS["dqn"] = Project(
    Dqn,
    lambda: loader(normal(16, 5)),
    swap={},
    insert={"where": ["policy.0", "target.0"], "num_components": 2},
    layers={"where": "policy.1"},
    em="",
)


class Ppo(Base):
    """An actor and a critic that act under ``no_grad``, then several losses from one rollout."""

    def __init__(self):
        super().__init__()
        self.environment = Corridor()
        self.actor, self.critic = mlp(5, 8, 2), mlp(5, 8, 1)

    def forward(self, x):
        return torch.distributions.Categorical(logits=self.actor(x)), self.critic(x)[..., 0]

    def predict_step(self, batch, batch_idx):
        return self(batch[0])[0].probs

    @torch.no_grad()
    def rollout(self):
        state, steps = self.environment.reset(), []
        for _ in range(6):
            policy, value = self(state[None])
            action = policy.sample()
            following, reward, _ = self.environment.step(action.item())
            steps.append((state, action[0], policy.log_prob(action)[0], torch.tensor(reward) - value[0]))
            state = following
        return [torch.stack(part) for part in zip(*steps, strict=True)]

    def loss(self, batch):
        states, actions, before, advantage = self.rollout()
        policy, value = self(states)
        ratio = (policy.log_prob(actions) - before).exp()
        clipped = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return F.mse_loss(value, advantage) - clipped.mean() - 0.01 * policy.entropy().mean()


PROJECTS["ppo"] = Project(
    Ppo,
    lambda: loader(normal(16, 5)),
    swap={"where": ["actor.*", "critic.*"]},
    insert={"where": "actor.0", "num_components": 2},
    layers={"where": ["actor.1", "critic.1"]},
    em="logsumexp",
)


class Byol(Base):
    """A student and an untrained copy of it that follows as a moving average."""

    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))
        self.predictor = mlp(4, 8, 4)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x):
        return self.student(x)

    def loss(self, batch):
        first, second = (batch[0] + 0.1 * torch.randn_like(batch[0]) for _ in range(2))
        with torch.no_grad():
            target = self.teacher(second)
        return -F.cosine_similarity(self.predictor(self(first)), target).mean()

    def training_step(self, batch, batch_idx):
        for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            old.data.lerp_(new.data, 0.1)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


PROJECTS["byol"] = Project(
    Byol,
    lambda: loader(normal(16, 8)),
    swap={},
    insert={"where": ["student.0", "teacher.0"], "num_components": 2},
    layers={"where": "student.2"},
    em="",
)


class Vae(Base):
    """Samples in the step, and tracks a metric that counts."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = mlp(8, 16, 4), mlp(2, 16, 8)

    def forward(self, x):
        mean, log_variance = self.encoder(x).chunk(2, -1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
        return self.decoder(code), mean, log_variance

    def loss(self, batch):
        output, mean, log_variance = self(batch[0])
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(-1).mean()
        return F.mse_loss(output, batch[0]) + 0.1 * divergence

    def predict_step(self, batch, batch_idx):
        return self(batch[0])[0]


PROJECTS["vae"] = Project(
    Vae,
    lambda: loader(normal(16, 8)),
    swap={"where": "decoder.*"},
    insert={"where": "decoder.0", "num_components": 2},
    layers={"where": "encoder.1"},
    em="",
)


class DoubleConv(nn.Sequential):
    def __init__(self, before, after):
        super().__init__(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True))


class UNet(Base):
    """Skip connections, in-place activations, batch norms, a loss of every pixel."""

    def __init__(self):
        super().__init__()
        self.inner, self.down, self.up = DoubleConv(1, 4), DoubleConv(4, 8), DoubleConv(12, 4)
        self.pool, self.upsample, self.head = nn.MaxPool2d(2), nn.Upsample(scale_factor=2), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        skip = self.inner(x)
        deep = self.upsample(self.down(self.pool(skip)))
        return self.head(self.up(torch.cat([skip, deep], 1)))


PROJECTS["unet"] = Project(
    UNet,
    lambda: loader(normal(12, 1, 6, 6), integers(3, 12, 6, 6)),
    swap={"where": ["down.*", "up.*"]},
    insert={"where": "down.0", "num_components": 2},
    layers={"where": "inner.2"},
)


class CausalAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CausalAttention(width, 2)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(0.1))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LanguageModel(Base):
    """A causal model of tokens whose head shares the weights of the embedding."""

    def __init__(self, vocabulary=11, width=8):
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(6, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def loss(self, batch):
        logits = self(batch[0])[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())


PROJECTS["language_model"] = Project(
    LanguageModel,
    lambda: loader(integers(11, 12, 6)),
    swap={"target": nn.GELU, "activation": "softmax_gated"},
    insert={"where": "blocks.*.mlp.0", "num_components": 2, "causal": True},
    layers={"where": "blocks.*.mlp.1", "weight": 0.01},
)


class TimeFirst(Base):
    """``nn.TransformerEncoder`` in its default layout (T, B, D), with a padding mask."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        padding = torch.zeros(len(x), x.shape[1], dtype=torch.bool)
        padding[:, -1] = True
        return self.head(self.encoder(x.transpose(0, 1), src_key_padding_mask=padding)[0])


PROJECTS["time_first"] = Project(
    TimeFirst,
    lambda: loader(normal(12, 5, 8), integers(3, 12)),
    swap={"where": "encoder.*"},
    insert={"where": "encoder.layers.*.linear1", "num_components": 2, "set_dim": 0},
    layers={"where": "encoder.layers.1.linear1", "weight": 0.01},
)


class Experts(Base):
    """Tokens go to the best of four experts; one gets none."""

    def __init__(self):
        super().__init__()
        self.embed, self.gate, self.head = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 3)
        self.experts = nn.ModuleList(mlp(8, 12, 8) for _ in range(4))

    def forward(self, x):
        tokens = self.embed(x)
        weights = F.softmax(self.gate(tokens) - 1e9 * F.one_hot(torch.tensor(3), 4), -1)
        weight, choice = weights.max(-1)
        output = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            chosen = choice == index
            output[chosen] = weight[chosen][:, None] * expert(tokens[chosen])
        return self.head(tokens + output)


PROJECTS["experts"] = Project(
    Experts,
    lambda: loader(normal(24, 6), integers(3, 24)),
    swap={"where": "experts.*"},
    insert={"where": "experts.*.0", "num_components": 2},
    layers={"where": "experts.*.1", "weight": 0.01},
    em="softmax",
)


def graphs():
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader as GraphLoader

    made = [
        Data(x=normal(5, 6, seed=i), edge_index=integers(5, 2, 9, seed=i), y=torch.tensor([i % 3])) for i in range(12)
    ]
    return GraphLoader(made, batch_size=4)


class Gin(Base):
    """Graph isomorphism layers on PyG's batches; pooling over nodes."""

    def __init__(self):
        from torch_geometric.nn import GINConv

        super().__init__()
        self.convs = nn.ModuleList(GINConv(mlp(size, 8, 8)) for size in (6, 8))
        self.relu, self.head = nn.ReLU(), nn.Linear(8, 3)

    def forward(self, batch):
        from torch_geometric.nn import global_add_pool

        x = batch.x
        for conv in self.convs:
            x = self.relu(conv(x, batch.edge_index))
        return self.head(global_add_pool(x, batch.batch))

    def inputs(self, batch):
        return batch

    def loss(self, batch):
        return F.cross_entropy(self(batch), batch.y)


PROJECTS["gin"] = Project(
    Gin,
    graphs,
    swap={"where": "convs.*"},
    insert={"where": "convs.0", "num_components": 2, "num_features": 8},
    layers={"where": "convs.*.nn.1", "weight": 0.01},
)


class DiffPool(Base):
    """Dense graphs; nodes are assigned to clusters by a softmax."""

    def __init__(self):
        from torch_geometric.nn import DenseSAGEConv

        super().__init__()
        self.embed, self.assign = DenseSAGEConv(6, 8), DenseSAGEConv(6, 2)
        self.conv, self.relu, self.head = DenseSAGEConv(8, 8), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, batch):
        from torch_geometric.nn import dense_diff_pool

        nodes, adjacency = batch
        x, adjacency, *self.regularizers = dense_diff_pool(
            self.relu(self.embed(nodes, adjacency)), adjacency, self.assign(nodes, adjacency)
        )
        return self.head(self.conv(x, adjacency).mean(1))

    def inputs(self, batch):
        return batch[:2]

    def loss(self, batch):
        return F.cross_entropy(self(batch[:2]), batch[2]) + sum(self.regularizers)


PROJECTS["diff_pool"] = Project(
    DiffPool,
    lambda: loader(normal(12, 5, 6), integers(2, 12, 5, 5).float(), integers(3, 12)),
    swap={},
    insert={"where": "embed", "num_components": 2, "num_features": 8},
    layers={"where": "relu", "weight": 0.01},
    em="softmax",
)


class VisionTransformer(Base):
    """Patches become tokens by a convolution and a permute; the first token is the class token."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        tokens = self.norm(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(self.encoder(torch.cat([self.token.expand(len(x), -1, -1), tokens], 1))[:, 0])


PROJECTS["vision_transformer"] = Project(
    VisionTransformer,
    lambda: loader(normal(12, 3, 8, 8), integers(3, 12)),
    swap={"target": nn.GELU},
    insert={"where": "norm", "num_components": 2},
    layers={"where": ["norm", "encoder.layers.0.linear1"], "weight": 0.01},
)


class ConvNextBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.LayerNorm(width)
        self.expand, self.act, self.project = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.project(self.act(self.expand(y)))).permute(0, 3, 1, 2)


class ConvNext(Base):
    """Channels go to the last axis and back in every block."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 2, 2), nn.Sequential(ConvNextBlock(4), ConvNextBlock(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


PROJECTS["convnext"] = Project(
    ConvNext,
    lambda: loader(normal(12, 3, 8, 8), integers(3, 12)),
    swap={"target": nn.GELU},
    insert={"where": "blocks.0", "num_components": 2, "dim": 1, "num_features": 4},
    layers={"where": "blocks.*.act", "weight": 0.01},
)


class Recurrent(Base):
    """An LSTM that returns a tuple, packed sequences aside."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(4, 10)
        self.lstm = nn.LSTM(10, 6, batch_first=True)
        self.head = mlp(6, 8, 3)

    def forward(self, x):
        return self.head(self.lstm(self.project(x))[0][:, -1])


PROJECTS["recurrent"] = Project(
    Recurrent,
    lambda: loader(normal(12, 5, 4), integers(3, 12)),
    swap={},
    insert={"where": "lstm", "num_components": 2, "causal": True},
    layers={"where": "head.1"},
)


@dataclasses.dataclass
class Horizon:
    past: int = 6
    future: int = 2


class Gated(nn.Module):
    """A gated residual network, of which temporal fusion transformers are made."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second, self.gate = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.act, self.norm = nn.ELU(), nn.LayerNorm(width)

    def forward(self, x):
        hidden = self.second(self.act(self.first(x)))
        return self.norm(x + torch.sigmoid(self.gate(hidden)) * hidden)


class Forecaster(Base):
    """Hyperparameters in a dataclass, batches as dictionaries, variables weighted by a softmax."""

    def __init__(self, horizon):
        super().__init__()
        self.save_hyperparameters()
        self.select, self.embed = nn.Linear(3, 3), nn.Linear(3, 8)
        self.gated, self.head = Gated(8), nn.Linear(8 * horizon.past, horizon.future)

    def forward(self, batch):
        weights = self.select(batch["past"]).softmax(-1)
        return self.head(self.gated(self.embed(weights * batch["past"])).flatten(1))

    def inputs(self, batch):
        return batch

    def loss(self, batch):
        return F.huber_loss(self(batch), batch["future"])


class Windows(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"past": normal(6, 3, seed=index), "future": normal(2, seed=index)}


PROJECTS["forecaster"] = Project(
    lambda: Forecaster(Horizon()),
    lambda: DataLoader(Windows(), batch_size=4),
    swap={"target": nn.ELU},
    insert={"where": "gated.first", "num_components": 2},
    layers={"where": "gated.act"},
    em="softmax",
    weights_only=False,
)
