"""Lightning's Trainer with LongContextModule and a dataset of your own."""

import lightning as L

import lctrain
from lctrain.callbacks import IsolationCheck, StepCheckpoint, ThroughputMonitor
from lctrain.config import OptimConfig

# Any list of texts, or a datasets.Dataset with the column "text".
texts = [f"Document {i}. " + f"Sentence {i} of a long text. " * (5 + i) for i in range(64)]
data = lctrain.PackedDataModule(texts, max_tokens=256, vocab_size=300, held_out_fraction=0.1)

# A model, the name of one on the hub, or a configuration for random weights.
model = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64}
model |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
module = lctrain.LongContextModule(model, OptimConfig(learning_rate=1e-2))

trainer = L.Trainer(
    max_steps=20,
    accumulate_grad_batches=2,
    callbacks=[IsolationCheck(), ThroughputMonitor(256), StepCheckpoint("checkpoints")],
    log_every_n_steps=5,
    num_sanity_val_steps=0,
)
trainer.fit(module, data)
print(trainer.test(module, data))
again = lctrain.LongContextModule.load_from_checkpoint("checkpoints/last.ckpt")
print(float(module.first_loss), "->", float(module.last_loss))
