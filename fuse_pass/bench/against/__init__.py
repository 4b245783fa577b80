"""Who a user could take instead of us on a CPU, one file each: `bench --against onnxruntime,openvino`.

Their packages are extras (`pip install 'fuse_pass[contenders]'`) and imported by the functions that build a call.
"""
