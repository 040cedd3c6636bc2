package raft

import (
	"bufio"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"net"
	"net/rpc"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// This file puts net/rpc on our own frames (docs/WIRE.md, "Frames"): fixed
// binary layouts read whole, lengths checked before memory is allocated,
// requests written without a system call each, replies deferred and coalesced.

// serviceName is what the methods of a node are registered under.
const serviceName = "ConsensusModule"

type methodID byte

const (
	methodRequestVote   methodID = 1
	methodAppendEntries methodID = 2
	methodForward       methodID = 3
	methodSnapshot      methodID = 4
	methodReadIndex     methodID = 5
)

// name returns net/rpc's name of the method, "" for an unknown one. The
// strings are constants: naming a request allocates nothing.
func (m methodID) name() string {
	switch m {
	case methodRequestVote:
		return serviceName + ".RequestVote"
	case methodAppendEntries:
		return serviceName + ".AppendEntries"
	case methodForward:
		return serviceName + ".Forward"
	case methodSnapshot:
		return serviceName + ".InstallSnapshot"
	case methodReadIndex:
		return serviceName + ".ReadIndex"
	}
	return ""
}

// call wraps the arguments and replies of the service's methods. net/rpc
// wants exported or unnamed types; an unnamed struct keeps ours out of godoc.
type call[T any] = struct {
	V T
	// In arguments, set by the server codec: whom to answer.
	req request
	// In a reply, set by the method: the codec writes nothing when the method
	// returns; the reply follows through WriteDeferred.
	deferred bool
}

// request names one request of one connection, so that it can be answered
// after its method has returned.
type request struct {
	codec *serverCodec
	seq   uint64
}

// codecLimits bounds what one connection may cost.
type codecLimits struct {
	maxBody      int           // bytes of a request's body
	maxInflight  int           // requests without a reply
	readBuffer   int           // bytes read by one system call
	writeTimeout time.Duration // of everything that one flush writes
	frameTimeout time.Duration // from a frame's first byte to its last
	idleTimeout  time.Duration // between frames; 0: none
}

type frameKind byte

const (
	frameRequest frameKind = 1
	frameReply   frameKind = 2
	frameError   frameKind = 3
)

const (
	frameMagic       = "rF"
	frameHeaderBytes = 28
	frameCRCOffset   = 24
	maxReplyBytes    = 1024
)

// errFrame is matched by every error that says the peer broke the protocol.
var errFrame = errors.New("raft: malformed frame")

func frameErrorf(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{errFrame}, args...)...)
}

type frameHeader struct {
	kind   frameKind
	method methodID
	length uint32
	seq    uint64
}

// maxLength returns how long the body of such a frame may be, -1 if there is
// no such frame. A client gets replies and errors, a server requests.
func (h frameHeader) maxLength(toServer bool, limits *codecLimits) int {
	switch {
	case h.method.name() == "":
		return -1
	case !toServer && (h.kind == frameReply || h.kind == frameError):
		return maxReplyBytes
	case !toServer || h.kind != frameRequest:
		return -1
	case h.method == methodRequestVote:
		return voteArgsBytes
	}
	return limits.maxBody
}

// frameReader takes whole, checked frames from a connection. One goroutine
// uses it.
type frameReader struct {
	conn     net.Conn
	br       *bufio.Reader
	version  byte
	toServer bool
	limits   *codecLimits
	armed    bool   // a read deadline is set
	scratch  []byte // reused body of a frame that nothing keeps
}

func (r *frameReader) init(conn net.Conn, version byte, toServer bool, limits *codecLimits) {
	*r = frameReader{conn: conn, version: version, toServer: toServer, limits: limits}
	r.br = bufio.NewReaderSize(conn, max(limits.readBuffer, frameHeaderBytes))
}

// complete tells whether a whole frame lies in the buffer, so that next
// will neither wait nor make a system call.
func (r *frameReader) complete() bool {
	n := r.br.Buffered()
	if n < frameHeaderBytes {
		return false
	}
	h, _ := r.br.Peek(frameHeaderBytes) // cannot fail: they are there
	return uint64(n-frameHeaderBytes) >= uint64(binary.LittleEndian.Uint32(h[8:]))
}

// await waits for a frame's first byte for as long as the connection may be
// idle, and then grants the rest of the frame its own time: a peer that sends
// a byte now and then is cut off like a silent one.
func (r *frameReader) await() error {
	if r.br.Buffered() == 0 {
		if r.limits.idleTimeout > 0 {
			r.deadline(r.limits.idleTimeout)
		} else if r.armed {
			r.conn.SetReadDeadline(time.Time{})
			r.armed = false
		}
		if _, err := r.br.Peek(1); err != nil {
			return explain(err, "nothing came for", r.limits.idleTimeout)
		}
	}
	if !r.complete() {
		r.deadline(r.limits.frameTimeout)
	}
	return nil
}

func (r *frameReader) deadline(d time.Duration) {
	r.conn.SetReadDeadline(time.Now().Add(d)) // an error here comes back from the read
	r.armed = true
}

// next returns the next frame. Its body is valid until the following call,
// except that of AppendEntries and Forward requests: that belongs to the
// caller, because entries refer to it.
func (r *frameReader) next() (frameHeader, []byte, error) {
	if err := r.await(); err != nil {
		return frameHeader{}, nil, err
	}
	raw, err := r.br.Peek(frameHeaderBytes)
	if err != nil {
		return frameHeader{}, nil, r.truncated(err)
	}
	h, err := r.header(raw)
	if err != nil {
		return h, nil, err
	}
	crc := crc32.Update(0, castagnoli, raw[:frameCRCOffset])
	want := binary.LittleEndian.Uint32(raw[frameCRCOffset:])
	r.br.Discard(frameHeaderBytes) // cannot fail: they were peeked

	var body []byte
	if r.toServer && h.method != methodRequestVote {
		body = make([]byte, h.length)
	} else {
		if cap(r.scratch) < int(h.length) {
			r.scratch = make([]byte, h.length)
		}
		body = r.scratch[:h.length]
	}
	if _, err := io.ReadFull(r.br, body); err != nil {
		return h, nil, r.truncated(err)
	}
	if got := crc32.Update(crc, castagnoli, body); got != want {
		return h, nil, frameErrorf("checksum is %08x, the frame says %08x", got, want)
	}
	return h, body, nil
}

// truncated says what an error within a frame means.
func (r *frameReader) truncated(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return explain(err, "a frame was not complete after", r.limits.frameTimeout)
}

func explain(err error, what string, d time.Duration) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("raft: %s %v: %w", what, d, err)
	}
	return err
}

func (r *frameReader) header(b []byte) (frameHeader, error) {
	h := frameHeader{
		kind:   frameKind(b[3]),
		method: methodID(b[4]),
		length: binary.LittleEndian.Uint32(b[8:]),
		seq:    binary.LittleEndian.Uint64(b[16:]),
	}
	switch group := binary.LittleEndian.Uint32(b[12:]); {
	case string(b[:2]) != frameMagic:
		return h, frameErrorf("starts with % x, want %q", b[:2], frameMagic)
	case b[2] != r.version:
		return h, frameErrorf("has version %d, the handshake chose %d", b[2], r.version)
	case b[5] != 0 || b[6] != 0 || b[7] != 0:
		return h, frameErrorf("flags and reserved bytes are % x, want zeros", b[5:8])
	case group != 0:
		return h, frameErrorf("is for group %d, this node has only group 0", group)
	case h.seq == 0:
		return h, frameErrorf("has number 0, which no request has")
	}
	limit := h.maxLength(r.toServer, r.limits)
	if limit < 0 {
		return h, frameErrorf("kind %d of method %d is not expected here", h.kind, h.method)
	}
	if uint64(h.length) > uint64(limit) {
		return h, frameErrorf("announces %d bytes, the limit for %s is %d", h.length, h.method.name(), limit)
	}
	return h, nil
}

// frameWriter collects frames and writes them with one system call. It may be
// used by several goroutines.
type frameWriter struct {
	conn    net.Conn
	version byte
	timeout time.Duration
	byRef   bool // large bodies are written from where they are, by writev

	// writing is held across a write, which is what it is for: frames of two
	// flushes must not mix. Nothing else waits for it. It is locked before mu.
	writing sync.Mutex
	vector  [][]byte // guarded by writing; the pieces of one write

	mu    sync.Mutex // held to compute
	buf   []byte
	refs  []bodyRef
	spare []byte // the buffer written last, to be used again
	err   error  // why the connection ended; nothing is collected any more
}

// bodyRef is part of a frame that is not copied: b follows buf[:at].
type bodyRef struct {
	at int
	b  []byte
}

const (
	refBytes      = 4 << 10 // smaller pieces are cheaper to copy than to scatter
	maxKeptBuffer = 1 << 20 // a burst's buffer is not kept for ever
)

func (w *frameWriter) init(conn net.Conn, version byte, limits *codecLimits) {
	w.conn, w.version, w.timeout = conn, version, limits.writeTimeout
	// On a tls.Conn a vector of slices becomes a record for each; an in-memory
	// connection would see a write for each. Both get one buffer.
	_, w.byRef = conn.(*net.TCPConn)
}

// frame collects one frame: what b encodes, then the entries of an append or
// of a forward, which must not change before they are flushed.
func (w *frameWriter) frame(kind frameKind, seq uint64, b wireBody, sealed []Entries, unsealed []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return w.err
	}
	start, firstRef := w.open(kind, b.method(), seq)
	w.buf = b.encode(w.buf)
	for i := range sealed {
		w.piece(sealed[i].Encoded())
	}
	w.piece(unsealed)
	w.seal(start, firstRef)
	return nil
}

// errorFrame encodes the frame that ends a connection.
func (w *frameWriter) errorFrame(method methodID, seq uint64, text string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		start, firstRef := w.open(frameError, method, seq)
		w.buf = append(w.buf, text[:min(len(text), maxReplyBytes)]...)
		w.seal(start, firstRef)
	}
}

func (w *frameWriter) open(kind frameKind, method methodID, seq uint64) (start, firstRef int) {
	start, firstRef = len(w.buf), len(w.refs)
	var h [frameHeaderBytes]byte
	copy(h[:], frameMagic)
	h[2], h[3], h[4] = w.version, byte(kind), byte(method)
	binary.LittleEndian.PutUint64(h[16:], seq)
	w.buf = append(w.buf, h[:]...)
	return start, firstRef
}

func (w *frameWriter) piece(b []byte) {
	if w.byRef && len(b) >= refBytes {
		w.refs = append(w.refs, bodyRef{len(w.buf), b})
	} else {
		w.buf = append(w.buf, b...)
	}
}

// seal writes length and checksum, which only the whole frame has.
func (w *frameWriter) seal(start, firstRef int) {
	h := w.buf[start : start+frameHeaderBytes]
	length := len(w.buf) - start - frameHeaderBytes
	for _, r := range w.refs[firstRef:] {
		length += len(r.b)
	}
	binary.LittleEndian.PutUint32(h[8:], uint32(length))
	crc := crc32.Update(0, castagnoli, h[:frameCRCOffset])
	off := start + frameHeaderBytes
	for _, r := range w.refs[firstRef:] {
		crc = crc32.Update(crc, castagnoli, w.buf[off:r.at])
		crc = crc32.Update(crc, castagnoli, r.b)
		off = r.at
	}
	binary.LittleEndian.PutUint32(h[frameCRCOffset:], crc32.Update(crc, castagnoli, w.buf[off:]))
}

// flush writes everything collected. It waits at most the write timeout. After
// a failed write the stream has a hole, so the connection is closed.
func (w *frameWriter) flush() error {
	w.writing.Lock()
	defer w.writing.Unlock()
	w.mu.Lock()
	buf, refs, err := w.buf, w.refs, w.err
	if err != nil || len(buf) == 0 {
		w.mu.Unlock()
		return err
	}
	w.buf, w.refs, w.spare = w.spare[:0], nil, nil
	w.mu.Unlock()

	w.conn.SetWriteDeadline(time.Now().Add(w.timeout)) // an error here comes back from the write
	if err := w.write(buf, refs); err != nil {
		return w.fail(fmt.Errorf("raft: writing to %v: %w", w.conn.RemoteAddr(), err))
	}
	if cap(buf) <= maxKeptBuffer {
		w.mu.Lock()
		w.spare = buf
		w.mu.Unlock()
	}
	return nil
}

func (w *frameWriter) write(buf []byte, refs []bodyRef) error {
	if len(refs) == 0 {
		_, err := w.conn.Write(buf)
		return err
	}
	pieces, off := w.vector[:0], 0
	for _, r := range refs {
		pieces = append(pieces, buf[off:r.at], r.b)
		off = r.at
	}
	if off < len(buf) {
		pieces = append(pieces, buf[off:])
	}
	w.vector = pieces
	bufs := net.Buffers(pieces)
	_, err := bufs.WriteTo(w.conn)
	clear(pieces) // do not keep entries alive
	return err
}

// fail ends the connection and notes why, unless that is known already.
// It returns the reason that counts.
func (w *frameWriter) fail(err error) error {
	w.mu.Lock()
	first := w.err == nil
	if first {
		w.err = err
		w.buf, w.refs, w.spare = nil, nil, nil
	}
	err = w.err
	w.mu.Unlock()
	if first {
		closeConn(w.conn)
	}
	return err
}

func (w *frameWriter) reason() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// closeConn closes at once. tls.Conn's own Close first sends an alert, for
// which it would wait up to 5 seconds on a peer that does not read; frames say
// themselves where they end, so nobody needs the alert.
func closeConn(conn net.Conn) {
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn()
	}
	conn.Close()
}

// serverCodec is the rpc.ServerCodec of one accepted connection. One goroutine
// drives it through rpc.Server.ServeRequest; WriteDeferred and FlushReplies
// may be called by others.
//
// It writes nothing by itself: whoever drives it calls FlushReplies when no
// further request is Buffered.
type serverCodec struct {
	in       frameReader
	out      frameWriter
	limits   codecLimits
	inflight atomic.Int64 // requests read and not yet replied to

	head  frameHeader // of the request being read
	body  []byte
	cause error // why its body could not be decoded
}

func newServerCodec(conn net.Conn, version byte, limits codecLimits) *serverCodec {
	c := &serverCodec{limits: limits}
	c.in.init(conn, version, true, &c.limits)
	c.out.init(conn, version, &c.limits)
	return c
}

// ReadRequestHeader reads one whole frame. net/rpc turns its error into a
// plain one; Err keeps it.
func (c *serverCodec) ReadRequestHeader(req *rpc.Request) error {
	h, body, err := c.in.next()
	if err == nil && c.inflight.Load() >= int64(c.limits.maxInflight) {
		err = frameErrorf("request %d comes while %d wait for a reply, the limit", h.seq, c.limits.maxInflight)
	}
	if err != nil {
		c.out.fail(err)
		return err // not what fail returns: net/rpc knows io.EOF by identity
	}
	c.inflight.Add(1)
	c.head, c.body = h, body
	req.ServiceMethod, req.Seq = h.method.name(), h.seq
	return nil
}

// ReadRequestBody decodes the frame that ReadRequestHeader read.
func (c *serverCodec) ReadRequestBody(body any) error {
	var v wireBody
	from := request{c, c.head.seq}
	switch b := body.(type) {
	case *call[voteArgs]:
		b.req, v = from, &b.V
	case *call[appendArgs]:
		b.req, v = from, &b.V
	case *call[forwardArgs]:
		b.req, v = from, &b.V
	case *call[snapshotArgs]:
		b.req, v = from, &b.V
	case *call[readArgs]:
		b.req, v = from, &b.V
	case nil: // net/rpc has given the request up
		c.body = nil
		return nil
	default:
		return c.reject(frameErrorf("no body is decoded into a %T", body))
	}
	if v.method() != c.head.method {
		return c.reject(frameErrorf("%s is served with the arguments of %s", c.head.method.name(), v.method().name()))
	}
	if err := v.decode(c.body); err != nil {
		return c.reject(frameErrorf("%s: %w", c.head.method.name(), err))
	}
	c.body = nil
	return nil
}

// reject notes why a request is refused; net/rpc calls WriteResponse with the
// text next.
func (c *serverCodec) reject(err error) error {
	c.body, c.cause = nil, err
	return err
}

// WriteResponse takes the reply of a method that returned. One marked deferred
// is withheld. An error means that the protocol was violated: it is sent and
// the connection ends.
func (c *serverCodec) WriteResponse(resp *rpc.Response, body any) error {
	if resp.Error != "" {
		c.out.errorFrame(c.head.method, resp.Seq, resp.Error)
		c.out.flush()
		if c.cause == nil {
			c.cause = errors.New(resp.Error)
		}
		return c.out.fail(c.cause)
	}
	switch b := body.(type) {
	case *call[voteReply]:
		if !b.deferred {
			return c.WriteDeferred(resp.Seq, &b.V)
		}
	case *call[appendReply]:
		if !b.deferred {
			return c.WriteDeferred(resp.Seq, &b.V)
		}
	case *call[forwardReply]:
		if !b.deferred {
			return c.WriteDeferred(resp.Seq, &b.V)
		}
	case *call[snapshotReply]:
		if !b.deferred {
			return c.WriteDeferred(resp.Seq, &b.V)
		}
	case *call[readReply]:
		if !b.deferred {
			return c.WriteDeferred(resp.Seq, &b.V)
		}
	default:
		return c.out.fail(fmt.Errorf("raft: no reply is encoded from a %T", body))
	}
	return nil
}

// WriteDeferred collects the reply to the request with this number; reply may
// be reused afterwards. Nothing leaves before FlushReplies. On a connection
// that has ended it does nothing but say so. Each request must be replied to
// once.
func (c *serverCodec) WriteDeferred(seq uint64, reply wireBody) error {
	c.inflight.Add(-1)
	return c.out.frame(frameReply, seq, reply, nil, nil)
}

// FlushReplies writes all replies collected, with one system call. It waits at
// most the write timeout, and only if the peer does not read.
func (c *serverCodec) FlushReplies() error { return c.out.flush() }

// Buffered tells whether another request can be read without waiting. At the
// limit of unanswered requests it says no, so that they are answered first.
func (c *serverCodec) Buffered() bool {
	return c.inflight.Load() < int64(c.limits.maxInflight) && c.in.complete()
}

// Err returns why the connection ended, nil if it has not: io.EOF if the peer
// closed it, net.ErrClosed after Close. One that matches errFrame says what
// was wrong with what the peer sent.
func (c *serverCodec) Err() error { return c.out.reason() }

// Close closes the connection. It may be called at any time by anybody.
func (c *serverCodec) Close() error {
	c.out.fail(net.ErrClosed)
	return nil
}

// clientCodec is the rpc.ClientCodec of one dialled connection.
type clientCodec struct {
	in     frameReader
	out    frameWriter
	limits codecLimits
	head   frameHeader // of the reply being read
	body   []byte
}

func newClientCodec(conn net.Conn, version byte, limits codecLimits) *clientCodec {
	c := &clientCodec{limits: limits}
	c.limits.idleTimeout = 0 // a client has nothing to read while it asks nothing
	c.in.init(conn, version, false, &c.limits)
	c.out.init(conn, version, &c.limits)
	return c
}

// WriteRequest only collects: net/rpc calls it holding a lock. An error means
// that nothing of the request was, or ever will be, sent.
func (c *clientCodec) WriteRequest(req *rpc.Request, args any) error {
	var v wireBody
	var sealed []Entries
	var unsealed []byte
	size := 0
	switch a := args.(type) {
	case *call[voteArgs]:
		v = &a.V
	case *call[appendArgs]:
		v, sealed, size = &a.V, a.V.Entries, appendArgsBytes+a.V.size()
	case *call[forwardArgs]:
		v, unsealed, size = &a.V, a.V.Encoded, forwardArgsBytes+len(a.V.Encoded)
	case *call[readArgs]:
		v = &a.V
	case *call[snapshotArgs]:
		v, unsealed, size = &a.V, a.V.Data, snapshotArgsBytes+len(a.V.Meta.Config)+len(a.V.Data)
	case nil: // rpcClient's sentinel: it is never sent
		return nil
	default:
		return fmt.Errorf("raft: no request is encoded from a %T", args)
	}
	if size > c.limits.maxBody {
		return fmt.Errorf("raft: a request of %d bytes is over the frame limit of %d", size, c.limits.maxBody)
	}
	return c.out.frame(frameRequest, req.Seq, v, sealed, unsealed)
}

// ReadResponseHeader reads one whole frame. net/rpc does not close the codec
// when reading fails, so this does.
func (c *clientCodec) ReadResponseHeader(resp *rpc.Response) error {
	h, body, err := c.in.next()
	if err != nil {
		c.out.fail(err)
		return err
	}
	c.head, c.body = h, body
	resp.ServiceMethod, resp.Seq = h.method.name(), h.seq
	if h.kind == frameError {
		resp.Error = "peer gave no reason"
		if len(body) > 0 {
			resp.Error = printable(string(body))
		}
	}
	return nil
}

// ReadResponseBody decodes the frame that ReadResponseHeader read.
func (c *clientCodec) ReadResponseBody(reply any) error {
	var v wireBody
	switch r := reply.(type) {
	case *call[voteReply]:
		v = &r.V
	case *call[appendReply]:
		v = &r.V
	case *call[forwardReply]:
		v = &r.V
	case *call[snapshotReply]:
		v = &r.V
	case *call[readReply]:
		v = &r.V
	case nil: // an error, or nobody waits for it any more
		return nil
	}
	if v == nil || v.method() != c.head.method {
		return c.out.fail(frameErrorf("a reply of %s came for a %T", c.head.method.name(), reply))
	}
	if err := v.decode(c.body); err != nil {
		return c.out.fail(frameErrorf("reply of %s: %w", c.head.method.name(), err))
	}
	return nil
}

func (c *clientCodec) Close() error {
	c.out.fail(net.ErrClosed)
	return nil
}

// rpcClient is an rpc.Client that sends when told to and whose Close joins
// net/rpc's goroutine.
type rpcClient struct {
	client   *rpc.Client
	codec    *clientCodec
	sentinel *rpc.Call
}

// newRPCClient starts a client. It owns the codec's connection, and one
// goroutine of net/rpc's until Close returns.
func newRPCClient(codec *clientCodec) *rpcClient {
	c := &rpcClient{codec: codec, client: rpc.NewClientWithCodec(codec)}
	// The first call gets number 0. The codec does not send it and refuses
	// frames with that number, so it stays pending until the client ends.
	c.sentinel = c.client.Go("", nil, nil, make(chan *rpc.Call, 1))
	return c
}

// Go makes a request; Flush sends it. The call comes out of done when it is
// answered or the connection has ended. done must have room for every call in
// flight: net/rpc drops those that find it full. args must not change until
// Flush has returned, and reply belongs to net/rpc until the call comes out:
// never reuse one whose call was given up.
func (c *rpcClient) Go(m methodID, args, reply any, done chan *rpc.Call) *rpc.Call {
	return c.client.Go(m.name(), args, reply, done)
}

// Flush writes all requests made so far, with one system call. It waits at
// most the write timeout, after which the connection is closed and all calls
// fail.
func (c *rpcClient) Flush() error { return c.codec.out.flush() }

// Err returns why the connection ended, nil if it has not.
func (c *rpcClient) Err() error { return c.codec.out.reason() }

// Close closes the connection, fails all calls and waits for net/rpc's
// goroutine. It may be called by several goroutines, and again.
//
// rpc.Client.Close only closes the codec; its goroutine, Client.input (Go
// 1.26, net/rpc/client.go), ends some time later. This is how we wait for it:
//
//   - Closing the connection ends input's read, and nothing else in its loop
//     waits: calls are completed by a send that gives up rather than block.
//   - After its loop input locks reqMutex and mutex, in this order, sets
//     shutdown and completes every pending call. The sentinel is one of them,
//     and is completed nowhere else: replies with its number are refused, and
//     writing it cannot fail. (If input was here before the sentinel was
//     registered, Go completed it at once, having seen shutdown under the
//     same locks.)
//   - Go locks reqMutex first. So once the sentinel is complete, a further Go
//     returns only after input has released reqMutex, the last thing it does
//     but for a test of the constant debugLog, and returning.
//
// What may remain when Close returns are the few instructions of that return:
// no call of our code, no lock, no wait.
func (c *rpcClient) Close() error {
	c.client.Close() // again: ErrShutdown, which is of no interest
	call := <-c.sentinel.Done
	c.sentinel.Done <- call // for whoever closes too; nobody else sends here any more
	c.client.Go("", nil, nil, make(chan *rpc.Call, 1))
	return nil
}

// wireBody is the body of a frame. decode accepts exactly what encode writes
// and frame adds: encode leaves out the entries of appends and forwards.
type wireBody interface {
	method() methodID
	encode(b []byte) []byte
	decode(b []byte) error
}

func (*voteArgs) method() methodID      { return methodRequestVote }
func (*voteReply) method() methodID     { return methodRequestVote }
func (*appendArgs) method() methodID    { return methodAppendEntries }
func (*appendReply) method() methodID   { return methodAppendEntries }
func (*forwardArgs) method() methodID   { return methodForward }
func (*forwardReply) method() methodID  { return methodForward }
func (*snapshotArgs) method() methodID  { return methodSnapshot }
func (*readArgs) method() methodID      { return methodReadIndex }
func (*readReply) method() methodID     { return methodReadIndex }
func (*snapshotReply) method() methodID { return methodSnapshot }

const (
	voteArgsBytes     = 33
	appendArgsBytes   = 49 // without the entries
	forwardArgsBytes  = 12 // without the entries
	snapshotArgsBytes = 93 // without the configuration and the data
)

func (a *voteArgs) encode(b []byte) []byte {
	b = appendUint64s(b, uint64(a.Term), uint64(a.Candidate), uint64(a.Last.Index), uint64(a.Last.Term))
	return append(b, flag(a.PreVote, 1)|flag(a.Transfer, 2))
}

func (a *voteArgs) decode(b []byte) error {
	r := reader{b: b}
	a.Term, a.Candidate, a.Last = Term(r.uint64()), memberID(r.uint64()), r.entryID()
	f := r.flags(3)
	a.PreVote, a.Transfer = f&1 != 0, f&2 != 0
	return r.finish()
}

func (v *voteReply) encode(b []byte) []byte {
	return append(appendUint64s(b, uint64(v.Term)), flag(v.Granted, 1)|flag(v.Removed, 2)|flag(v.Behind, 4))
}

func (v *voteReply) decode(b []byte) error {
	r := reader{b: b}
	v.Term = Term(r.uint64())
	f := r.flags(7)
	v.Granted, v.Removed, v.Behind = f&1 != 0, f&2 != 0, f&4 != 0
	return r.finish()
}

func (a *appendArgs) encode(b []byte) []byte {
	b = appendUint64s(b, uint64(a.Term), uint64(a.Leader), a.Seq, uint64(a.Prev.Index), uint64(a.Prev.Term), uint64(a.Commit))
	b = append(b, flag(a.Heartbeat, 1)|flag(a.Campaign, 2)|flag(a.Lease > 0, 4))
	if a.Lease > 0 {
		b = appendUint64s(b, uint64(a.Lease))
	}
	return b
}

// decode keeps b: the entries refer to it.
func (a *appendArgs) decode(b []byte) error {
	r := reader{b: b}
	a.Term, a.Leader, a.Seq = Term(r.uint64()), memberID(r.uint64()), r.uint64()
	a.Prev, a.Commit = r.entryID(), Index(r.uint64())
	f := r.flags(7)
	a.Heartbeat, a.Campaign, a.Lease = f&1 != 0, f&2 != 0, 0
	if f&4 != 0 {
		lease := r.uint64()
		if !a.Heartbeat || a.Campaign || lease == 0 || lease > uint64(maxLeasePromise) {
			return fmt.Errorf("asks for a promise of %d ns, flags %d", lease, f)
		}
		a.Lease = time.Duration(lease)
	}
	encoded := r.bytes(uint64(len(r.b)))
	if err := r.finish(); err != nil {
		return err
	}
	if a.Prev.Index >= 1<<63 {
		return fmt.Errorf("prev index %d is impossible", a.Prev.Index)
	}
	if len(encoded) == 0 {
		a.Entries = nil
		return nil
	}
	if a.Heartbeat {
		return errors.New("a heartbeat carries entries")
	}
	e, err := ParseEntries(a.Prev.Index+1, encoded)
	if err != nil {
		return err
	}
	if first, last := e.term(0), e.term(e.Len()-1); first < a.Prev.Term || last > a.Term {
		return fmt.Errorf("entries of terms %d to %d follow one of term %d in an append of term %d", first, last, a.Prev.Term, a.Term)
	}
	a.Entries = []Entries{e}
	return nil
}

func (v *appendReply) encode(b []byte) []byte {
	b = appendUint64s(b, uint64(v.Term), uint64(v.Hint.Index), uint64(v.Hint.Term), uint64(v.Wanted))
	return append(b, flag(v.Success, 1)|flag(v.Promised, 2)|flag(v.Full, 4)|flag(v.NoRoom, 8))
}

func (v *appendReply) decode(b []byte) error {
	r := reader{b: b}
	v.Term, v.Hint, v.Wanted = Term(r.uint64()), r.entryID(), Index(r.uint64())
	f := r.flags(15)
	v.Success, v.Promised, v.Full, v.NoRoom = f&1 != 0, f&2 != 0, f&4 != 0, f&8 != 0
	return r.finish()
}

func (a *forwardArgs) encode(b []byte) []byte {
	b = appendUint64s(b, uint64(a.From))
	return binary.LittleEndian.AppendUint32(b, uint32(a.Count))
}

// decode keeps b. It checks that the entries are as many as announced;
// entryBuilder.addUnsealed checks the entries.
func (a *forwardArgs) decode(b []byte) error {
	r := reader{b: b}
	a.From, a.Count = memberID(r.uint64()), int(r.uint32())
	a.Encoded = r.bytes(uint64(len(r.b)))
	if err := r.finish(); err != nil {
		return err
	}
	n := 0
	for rest := (reader{b: a.Encoded}); len(rest.b) > 0; n++ {
		if h := rest.bytes(entryHeaderBytes); rest.err == nil {
			rest.bytes(uint64(binary.LittleEndian.Uint32(h[4:])))
		}
		if rest.err != nil {
			return errEntryCorrupt
		}
	}
	if n == 0 || n != a.Count {
		return fmt.Errorf("announces %d entries and carries %d", a.Count, n)
	}
	return nil
}

func (v *forwardReply) encode(b []byte) []byte {
	return appendUint64s(append(b, byte(v.Refusal)), uint64(v.First.Index), uint64(v.First.Term), uint64(v.Leader))
}

func (v *forwardReply) decode(b []byte) error {
	r := reader{b: b}
	v.Refusal, v.First, v.Leader = forwardRefusal(r.byte()), r.entryID(), memberID(r.uint64())
	return r.finish()
}

func (a *snapshotArgs) encode(b []byte) []byte {
	b = appendUint64s(b, uint64(a.Term), uint64(a.Leader), a.Size, a.Offset)
	at := len(b)
	b = a.Meta.encode(append(b, 0, 0, 0, 0))
	binary.LittleEndian.PutUint32(b[at:], uint32(len(b)-at-4))
	return b
}

// decode keeps b: the data refers to it.
func (a *snapshotArgs) decode(b []byte) (err error) {
	r := reader{b: b}
	a.Term, a.Leader, a.Size, a.Offset = Term(r.uint64()), memberID(r.uint64()), r.uint64(), r.uint64()
	meta := r.bytes(uint64(r.uint32()))
	a.Data = r.bytes(uint64(len(r.b)))
	if err := r.finish(); err != nil {
		return err
	}
	if a.Meta, err = decodeSnapshotMeta(meta); err != nil {
		return err
	}
	if a.Size > math.MaxInt64 || a.Offset > a.Size || uint64(len(a.Data)) > a.Size-a.Offset {
		return fmt.Errorf("a block of %d bytes at %d is outside a snapshot of %d", len(a.Data), a.Offset, a.Size)
	}
	if a.Meta.Last.Term > a.Term {
		return fmt.Errorf("a snapshot up to an entry of term %d comes in term %d", a.Meta.Last.Term, a.Term)
	}
	return nil
}

func (v *snapshotReply) encode(b []byte) []byte {
	return append(appendUint64s(b, uint64(v.Term), v.Offset), flag(v.Done, 1))
}

func (v *snapshotReply) decode(b []byte) error {
	r := reader{b: b}
	v.Term, v.Offset = Term(r.uint64()), r.uint64()
	v.Done = r.flags(1) != 0
	return r.finish()
}

func (a *readArgs) encode(b []byte) []byte {
	return append(appendUint64s(b, uint64(a.From)), flag(a.Lease, 1))
}

func (a *readArgs) decode(b []byte) error {
	r := reader{b: b}
	a.From, a.Lease = memberID(r.uint64()), r.flags(1) != 0
	return r.finish()
}

func (v *readReply) encode(b []byte) []byte {
	return append(appendUint64s(b, uint64(v.Index)), flag(v.Refused, 1))
}

func (v *readReply) decode(b []byte) error {
	r := reader{b: b}
	v.Index = Index(r.uint64())
	v.Refused = r.flags(1) != 0
	return r.finish()
}

func (r *reader) uint32() uint32 {
	if b := r.bytes(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

func (r *reader) entryID() EntryID {
	return EntryID{Index: Index(r.uint64()), Term: Term(r.uint64())}
}

var errLong = errors.New("raft: message is longer than its fields")

func (r *reader) finish() error {
	if r.err == nil && len(r.b) != 0 {
		r.err = errLong
	}
	return r.err
}
