"""The command line: `jaxllm COMMAND`, one module a command."""
