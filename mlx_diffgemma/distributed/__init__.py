"""One model over several Macs, with the collectives of `mx.distributed`."""
