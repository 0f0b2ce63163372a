"""The command nnssl_plugin, one module per verb."""
