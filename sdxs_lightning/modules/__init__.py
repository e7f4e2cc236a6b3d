"""The LightningModules: student generator, fake score, discriminator, and one composition a stage."""
