"""A whole world on one machine, for the demo, the tests and the benchmarks.

An API server on etcd, a private libvirtd, a guest that keeps writing. Every part is a real one; each lives in a
directory that it is given and listens on loopback only. What runs before anything is installed uses the standard
library alone.
"""
