"""One optimizer update: megatron-core's engine and DeepSpeed's, behind one interface."""
