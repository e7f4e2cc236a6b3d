"""ControlNets: of the base by denoising, of the one-step student by distillation, and the readers of conditions."""
