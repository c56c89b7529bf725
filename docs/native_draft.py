import ctypes, math, numpy as np, torch, time, sys
lib = ctypes.CDLL("./infer_cpu.so")
T = lib.tokens_of_tile()
P=ctypes.c_void_p; I64=ctypes.c_int64; I32=ctypes.c_int32; F=ctypes.c_float
class Weights(ctypes.Structure):
    _fields_=[("outputs",I64),("inputs",I64),("pattern",I32),("starts",P),("columns",P),("blocks",P),("sums",P),("scales",P),("bias",P)]
lib.linear.argtypes=[ctypes.POINTER(Weights),I64,P,P,P,F,I32,I32,I32]; lib.linear.restype=None
lib.to_tiles.argtypes=[I64,I64,P,P]; lib.to_tiles.restype=None
lib.quantize.argtypes=[I64,I64,P,P,F,I32,I32,I32]; lib.quantize.restype=None
lib.layer_norm.argtypes=[I64,I64,P,P,P,P,F,P,P,F,I32,I32,I32]; lib.layer_norm.restype=None
lib.attention.argtypes=[I64,P,I64,I64,P,P,P,I64,F,I32,I32,I32]; lib.attention.restype=None
lib.floats_of_scratch.argtypes=[I64,I64]; lib.floats_of_scratch.restype=I64
def aligned(n,dtype):
    size=torch.empty(0,dtype=dtype).element_size()
    raw=torch.zeros(n*size+64,dtype=torch.uint8); o=(-raw.data_ptr())%64
    return raw[o:o+n*size].view(dtype)
def tiles(n): return -(-n//T)
def pack(q, pattern, s_x, z, s_w, bias):
    """q int8 (out,in)"""
    out,inn=q.shape
    q=q.numpy()
    if pattern==0:
        b=q.reshape(out,inn//4,4); live=b.any(2)
        r,c=np.nonzero(live); starts=np.zeros(out+1,np.int32); starts[1:]=np.cumsum(live.sum(1))
        cols=c.astype(np.uint16); blocks=np.ascontiguousarray(b[r,c]).view(np.int32).ravel()
    elif pattern==1:
        b=q.reshape(out//4,4,inn); cols=[];blocks=[];starts=[0]
        for s in range(out//4):
            k=np.nonzero(b[s].any(0))[0]; n=-(-len(k)//4)*4
            kk=np.zeros(n,np.int64); kk[:len(k)]=k
            w=np.zeros((4,n),np.int8); w[:,:len(k)]=b[s][:,k]
            cols.append(kk.astype(np.uint16)); blocks.append(np.ascontiguousarray(w.reshape(4,n//4,4).transpose(1,0,2)).view(np.int32).ravel()); starts.append(starts[-1]+n//4)
        cols=np.concatenate(cols);blocks=np.concatenate(blocks);starts=np.array(starts,np.int32)
    else:
        cols=[];blocks=[];starts=[0]
        for r in range(out):
            k=np.nonzero(q[r])[0]; n=-(-len(k)//4)*4
            kk=np.zeros(n,np.int64); kk[:len(k)]=k; w=np.zeros(n,np.int8); w[:len(k)]=q[r,k]
            cols.append(kk.astype(np.uint16)); blocks.append(w.view(np.int32)); starts.append(starts[-1]+n//4)
        cols=np.concatenate(cols);blocks=np.concatenate(blocks);starts=np.array(starts,np.int32)
    sums=(q.astype(np.int64).sum(1)*z).astype(np.int32)
    keep=[np.ascontiguousarray(a) for a in (starts,cols,blocks,sums,(s_x*s_w).astype(np.float32),bias.astype(np.float32))]
    w=Weights(out,inn,pattern,*[a.ctypes.data for a in keep]); w.keep=keep
    return w
def run(w,x,s_x,z,highest=255):
    n,K=x.shape; t=tiles(n)
    xt=aligned(t*K*T,torch.float32); q=aligned(t*K*T,torch.uint8); y=aligned(t*w.outputs*T,torch.float32)
    lib.to_tiles(n,K,x.contiguous().data_ptr(),xt.data_ptr())
    lib.quantize(n,K,xt.data_ptr(),q.data_ptr(),1/s_x,z,highest,int(w.pattern==0))
    lib.linear(ctypes.byref(w),n,q.data_ptr(),y.data_ptr(),None,0,0,0,0)
    return y.view(t,w.outputs,T).permute(0,2,1).reshape(t*T,w.outputs)[:n], q
def sparse(out,inn,s,pattern,g):
    q=torch.randint(-127,128,(out,inn),generator=g,dtype=torch.int8)
    shape={0:(out,inn//4),1:(out//4,inn),2:(out,inn)}[pattern]
    m=torch.rand(shape,generator=g)>=s
    if pattern==0:m=m.repeat_interleave(4,1)
    if pattern==1:m=m.repeat_interleave(4,0)
    return q*m
if __name__=="__main__":
    g=torch.Generator().manual_seed(0)
    for out,inn,n in ((64,32,5),(768,768,128),(8,3072,77),(36,64,200),(768,768,130)):
        for pattern in (0,1,2):
            for s in (0,.8,.99):
                q=sparse(out,inn,s,pattern,g); z=101
                w=pack(q,pattern,1.0,z,np.ones(out),np.zeros(out))
                lv=torch.randint(0,256,(n,inn),generator=g); lv[0]=255; lv[-1]=0
                y,_=run(w,(lv-z).float(),1.0,z)
                ref=((lv-z).double()@q.double().T).float()
                assert torch.equal(y,ref),(out,inn,n,pattern,s,(y-ref).abs().max())
    print("linear exact")
    # attention
    H=96;heads=3;D=32
    lens=[5,33,64,1,100]; st=np.cumsum([0]+lens).astype(np.int64); n=int(st[-1])
    qkv=torch.randn(n,3*H,generator=g); t=tiles(n)
    xt=aligned(t*3*H*T,torch.float32); lib.to_tiles(n,3*H,qkv.data_ptr(),xt.data_ptr())
    qa=aligned(t*H*T,torch.uint8); sf=lib.floats_of_scratch(max(lens),D)//16*16; scratch=aligned(sf*2,torch.float32)
    lib.attention(len(lens),st.ctypes.data,heads,D,xt.data_ptr(),qa.data_ptr(),scratch.data_ptr(),sf,100.0,128,255,1)
    got=(qa.view(t,H//4,T,4).permute(0,2,1,3).reshape(t*T,H)[:n].float()-128)/100
    for a,b in zip(st[:-1],st[1:]):
        q,k,v=(x.view(-1,heads,D).transpose(0,1) for x in qkv[a:b].split(H,1))
        r=torch.nn.functional.scaled_dot_product_attention(q[None],k[None],v[None])[0].transpose(0,1).reshape(-1,H)
        r=(r*100).round().clamp(-128,127)/100
        print((got[a:b]-r).abs().max().item(), ((got[a:b]-r).abs()>1e-4).float().mean().item())
    # time
    torch.set_num_threads(1)
    for out,inn in ((768,768),(3072,768),(768,3072)):
      for n in (128,):
        for pattern,s in ((0,.8),(1,.8),(2,.9),(0,0)):
            q=sparse(out,inn,s,pattern,g); w=pack(q,pattern,1.0,100,np.ones(out),np.zeros(out))
            qq=aligned(tiles(n)*inn*T,torch.uint8); y=aligned(tiles(n)*out*T,torch.float32)
            ts=[]
            for _ in range(30):
                t0=time.perf_counter(); lib.linear(ctypes.byref(w),n,qq.data_ptr(),y.data_ptr(),None,0,0,0,0); ts.append(time.perf_counter()-t0)
            ts=sorted(ts)[8]; nz=int((q!=0).sum()); print(out,inn,n,pattern,s,f"{ts*1e3:.3f} ms {2*nz*n/ts/1e9:.0f} Gop/s")
