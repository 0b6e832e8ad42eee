"""A real Kubernetes control plane for the tests, and what stands in for the rest of a cluster.

binaries (where etcd and the API servers come from) -> control_plane (starts them, one endpoint) ->
training_operator and kubelet (stand-ins, the second runs pods as processes of this machine) ->
fixtures. Nothing in here is part of the product.
"""
