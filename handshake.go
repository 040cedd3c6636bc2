package raft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"net"
	"strings"
	"time"
	"unicode"
)

// The handshake decides who may talk, before any Raft byte is read
// (docs/WIRE.md, "Greetings").

// The wire versions that this build speaks.
const (
	minWireVersion = 1
	maxWireVersion = 1
)

// wireVersions is the range of wire versions that a node speaks.
type wireVersions struct{ min, max byte }

// common returns the highest version in both ranges, false if there is none.
func (v wireVersions) common(other wireVersions) (byte, bool) {
	version := min(v.max, other.max)
	return version, version >= v.min && version >= other.min
}

type greetingKind byte

const (
	greetHello    greetingKind = 1
	greetWelcome  greetingKind = 2
	greetRefusal  greetingKind = 3
	greetForm     greetingKind = 4
	greetFormBack greetingKind = 5
)

func (k greetingKind) String() string {
	switch k {
	case greetHello:
		return "hello"
	case greetWelcome:
		return "welcome"
	case greetRefusal:
		return "refusal"
	case greetForm:
		return "formation question"
	case greetFormBack:
		return "formation answer"
	}
	return fmt.Sprintf("greeting of kind %d", byte(k))
}

const (
	greetingMagic       = "RAFW"
	greetingHeaderBytes = 16
	maxHandshakeBytes   = 4 << 10  // of a whole hello, welcome or refusal
	maxFormationBytes   = 64 << 10 // of a whole formation greeting
	maxRefusalText      = 1024
)

// HandshakeReason says why a connection was refused.
type HandshakeReason byte

const (
	// HandshakeWrongMagic: the other side speaks another protocol.
	HandshakeWrongMagic HandshakeReason = iota + 1
	// HandshakeNoCommonVersion: the ranges of wire versions do not overlap.
	HandshakeNoCommonVersion
	// HandshakeOtherCluster: it belongs to another cluster.
	HandshakeOtherCluster
	// HandshakeOtherNode: another node answers at this address.
	HandshakeOtherNode
	// HandshakeOtherDirectory: a known node came with another data directory.
	HandshakeOtherDirectory
	// HandshakeRoleRefused: this role or channel is not served.
	HandshakeRoleRefused
	// HandshakeStopping: the node is shutting down.
	HandshakeStopping
	// HandshakeMalformed: a greeting does not follow the protocol.
	HandshakeMalformed
	// HandshakeOldDirectory: a node with this data directory was started more
	// often than the one that came: the directory was rolled back, or is an
	// older copy.
	HandshakeOldDirectory
	// HandshakeRunningTwice: two nodes run with copies of one data directory.
	HandshakeRunningTwice
)

func (r HandshakeReason) String() string {
	switch r {
	case HandshakeWrongMagic:
		return "not this protocol"
	case HandshakeNoCommonVersion:
		return "no common wire version"
	case HandshakeOtherCluster:
		return "other cluster"
	case HandshakeOtherNode:
		return "other node"
	case HandshakeOtherDirectory:
		return "other data directory"
	case HandshakeRoleRefused:
		return "role refused"
	case HandshakeStopping:
		return "stopping"
	case HandshakeMalformed:
		return "malformed greeting"
	case HandshakeOldDirectory:
		return "old state of a data directory"
	case HandshakeRunningTwice:
		return "one data directory runs twice"
	}
	return fmt.Sprintf("reason %d", byte(r))
}

// HandshakeError is why a connection between two nodes was not made. Both
// sides have it.
type HandshakeError struct {
	Reason HandshakeReason
	Peer   string // the other side: its NodeID if it said one, and its address
	ByPeer bool   // the other side refused; otherwise this one did
	Text   string // what was found, what was wanted, what to do
}

func (e *HandshakeError) Error() string {
	if e.ByPeer {
		return fmt.Sprintf("raft: %s refused the connection: %v: %s", e.Peer, e.Reason, e.Text)
	}
	return fmt.Sprintf("raft: refused the connection with %s: %v: %s", e.Peer, e.Reason, e.Text)
}

type peerRole byte

const (
	rolePeer   peerRole = 1 // a node
	roleClient peerRole = 2 // an operator's tool
)

type channel byte

const (
	channelControl   channel = 1
	channelAppend    channel = 2
	channelFormation channel = 3
	channelSnapshot  channel = 4
	channelRead      channel = 5
)

func (c channel) String() string {
	switch c {
	case channelControl:
		return "control"
	case channelAppend:
		return "append"
	case channelFormation:
		return "formation"
	case channelSnapshot:
		return "snapshot"
	case channelRead:
		return "read"
	}
	return fmt.Sprintf("channel %d", byte(c))
}

// hello is what a dialler says first.
type hello struct {
	MinVersion, MaxVersion byte
	Role                   peerRole
	Channel                channel
	Nonce                  uint64 // random, of this run of the dialler
	Boot                   uint64 // how often the dialler's directory was opened; zero for a client
	DirectoryID            [16]byte
	ClusterUUID            [16]byte // zero while unformed
	Cluster                string
	From, To               NodeID
}

// welcome is the acceptor's consent.
type welcome struct {
	Version     byte // chosen by acceptHandshake
	Nonce       uint64
	Boot        uint64
	DirectoryID [16]byte
}

// refusal is the acceptor's denial.
type refusal struct {
	Reason HandshakeReason
	Text   string
}

func (h *hello) encode(b []byte) []byte {
	b = append(b, h.MinVersion, h.MaxVersion, byte(h.Role), byte(h.Channel))
	b = appendUint64s(b, h.Nonce, h.Boot)
	b = append(append(b, h.DirectoryID[:]...), h.ClusterUUID[:]...)
	return appendString(appendString(appendString(b, h.Cluster), string(h.From)), string(h.To))
}

func decodeHello(b []byte) (h hello, err error) {
	r := reader{b: b}
	h.MinVersion, h.MaxVersion = r.byte(), r.byte()
	h.Role, h.Channel = peerRole(r.byte()), channel(r.byte())
	h.Nonce, h.Boot = r.uint64(), r.uint64()
	copy(h.DirectoryID[:], r.bytes(16))
	copy(h.ClusterUUID[:], r.bytes(16))
	h.Cluster, h.From, h.To = r.string(), NodeID(r.string()), NodeID(r.string())
	return h, r.err // a later version may have added fields
}

func (w *welcome) encode(b []byte) []byte {
	return append(appendUint64s(append(b, w.Version), w.Nonce, w.Boot), w.DirectoryID[:]...)
}

func decodeWelcome(b []byte) (w welcome, err error) {
	r := reader{b: b}
	w.Version, w.Nonce, w.Boot = r.byte(), r.uint64(), r.uint64()
	copy(w.DirectoryID[:], r.bytes(16))
	return w, r.err
}

func (f *refusal) encode(b []byte) []byte {
	return appendString(append(b, byte(f.Reason)), f.Text[:min(len(f.Text), maxRefusalText)])
}

func decodeRefusal(b []byte) (f refusal, err error) {
	r := reader{b: b}
	f.Reason, f.Text = HandshakeReason(r.byte()), printable(r.string())
	return f, r.err
}

// printable makes text that a peer chose fit for a log: one line, no control
// characters.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}

// encodeGreeting wraps a body into its envelope.
func encodeGreeting(kind greetingKind, body []byte) []byte {
	b := make([]byte, greetingHeaderBytes, greetingHeaderBytes+len(body))
	copy(b, greetingMagic)
	b[4] = byte(kind)
	binary.LittleEndian.PutUint32(b[8:], uint32(len(body)))
	binary.LittleEndian.PutUint32(b[12:], greetingCRC(b, body))
	return append(b, body...)
}

func greetingCRC(header, body []byte) uint32 {
	return crc32.Update(crc32.Update(0, castagnoli, header[:12]), castagnoli, body)
}

// greetingProblem is a HandshakeError that does not know its peer yet.
type greetingProblem struct {
	reason HandshakeReason
	text   string
}

func (p *greetingProblem) Error() string { return p.text }

func malformedf(format string, args ...any) error {
	return &greetingProblem{HandshakeMalformed, fmt.Sprintf(format, args...) + "; if it is a node, both must run compatible releases of this library"}
}

// readGreeting reads exactly one greeting of at most maxBytes, and nothing of
// what follows it.
func readGreeting(r io.Reader, maxBytes int) (greetingKind, []byte, error) {
	var h [greetingHeaderBytes]byte
	// Other protocols may be shorter than our header and then wait for us.
	if _, err := io.ReadFull(r, h[:4]); err != nil {
		return 0, nil, err
	}
	if string(h[:4]) != greetingMagic {
		return 0, nil, &greetingProblem{HandshakeWrongMagic, describeForeign(h[:4])}
	}
	if _, err := io.ReadFull(r, h[4:]); err != nil {
		return 0, nil, err
	}
	length := binary.LittleEndian.Uint32(h[8:])
	if h[5] != 0 || h[6] != 0 || h[7] != 0 {
		return 0, nil, malformedf("reserved bytes are % x, want zeros", h[5:8])
	}
	if uint64(length) > uint64(maxBytes-greetingHeaderBytes) {
		return 0, nil, malformedf("it announces %d bytes, the limit is %d", length, maxBytes-greetingHeaderBytes)
	}
	body := make([]byte, length)
	if _, err := io.ReadFull(r, body); err != nil {
		return 0, nil, err
	}
	if got, want := greetingCRC(h[:], body), binary.LittleEndian.Uint32(h[12:]); got != want {
		return 0, nil, malformedf("its checksum is %08x, it says %08x", got, want)
	}
	return greetingKind(h[4]), body, nil
}

// describeForeign guesses who is there from its first 4 bytes.
func describeForeign(b []byte) string {
	switch {
	case b[0] == 0x16 && b[1] == 3, b[0] == 0x15 && b[1] == 3:
		return "it speaks TLS and this node does not; set Config.TLS on every node or on none"
	case bytes.Contains([]byte("GET POSTPUT HEADHTTP/1.OPTIDELEPATCCONNPRI "), b):
		return "it speaks HTTP; this address is for the nodes of the cluster"
	}
	return fmt.Sprintf("it starts with % x, want % x (%s); check the address: only nodes of the cluster may talk here", b, greetingMagic, greetingMagic)
}

// dialHandshake introduces this node on a new connection and returns what the
// other side answered. A refusal, by either side, is a *HandshakeError. After
// an error the caller closes conn.
func dialHandshake(conn net.Conn, h hello, timeout time.Duration) (welcome, error) {
	conn.SetDeadline(time.Now().Add(timeout)) // an error here comes back from the first write
	w, err := introduce(conn, &h)
	if err != nil {
		return welcome{}, handshakeFailure(conn, h.To, timeout, err)
	}
	conn.SetDeadline(time.Time{})
	return w, nil
}

func introduce(conn net.Conn, h *hello) (welcome, error) {
	b := encodeGreeting(greetHello, h.encode(nil))
	if len(b) > maxHandshakeBytes {
		return welcome{}, malformedf("the own hello has %d bytes, the limit is %d: ClusterID or NodeIDs are too long", len(b), maxHandshakeBytes)
	}
	if _, err := conn.Write(b); err != nil {
		return welcome{}, err
	}
	kind, body, err := readGreeting(conn, maxHandshakeBytes)
	if err != nil {
		return welcome{}, err
	}
	switch kind {
	case greetWelcome:
		w, err := decodeWelcome(body)
		if err != nil {
			return w, malformedf("its welcome is cut short")
		}
		if w.Version < h.MinVersion || w.Version > h.MaxVersion {
			return w, malformedf("it chose wire version %d out of %d to %d", w.Version, h.MinVersion, h.MaxVersion)
		}
		return w, nil
	case greetRefusal:
		f, err := decodeRefusal(body)
		if err != nil {
			return welcome{}, malformedf("its refusal is cut short")
		}
		return welcome{}, &HandshakeError{Reason: f.Reason, ByPeer: true, Text: f.Text}
	}
	return welcome{}, malformedf("it answered the hello with a %v", kind)
}

// handshakeFailure names the peer in an error and the deadline in a timeout.
func handshakeFailure(conn net.Conn, peer NodeID, timeout time.Duration, err error) error {
	name := conn.RemoteAddr().String()
	if peer != "" {
		name = fmt.Sprintf("%q (%s)", peer, name)
	}
	var p *greetingProblem
	var h *HandshakeError
	var n net.Error
	switch {
	case errors.As(err, &p):
		return &HandshakeError{Reason: p.reason, Peer: name, Text: p.text}
	case errors.As(err, &h):
		h.Peer = name
		return h
	case errors.As(err, &n) && n.Timeout():
		return fmt.Errorf("raft: handshake with %s was not done after %v: %w", name, timeout, err)
	case err == io.EOF || err == io.ErrUnexpectedEOF:
		return fmt.Errorf("raft: %s hung up during the handshake; its log may say why, and whether it expects TLS: %w", name, err)
	}
	return fmt.Errorf("raft: handshake with %s: %w", name, err)
}

// acceptHandshake hears the hello of an accepted connection and lets decide
// answer it: with a welcome, whose version it fills in from what own and the
// hello have in common, or a refusal. decide is not asked when that is
// nothing. The error is a
// *HandshakeError if either side broke the protocol or decide refused; after
// an error the caller closes conn.
func acceptHandshake(conn net.Conn, own wireVersions, decide func(hello) (welcome, *refusal), timeout time.Duration) (hello, welcome, error) {
	conn.SetDeadline(time.Now().Add(timeout)) // an error here comes back from the first read
	h, w, err := receive(conn, own, decide)
	if err != nil {
		return h, welcome{}, handshakeFailure(conn, h.From, timeout, err)
	}
	conn.SetDeadline(time.Time{})
	return h, w, nil
}

func receive(conn net.Conn, own wireVersions, decide func(hello) (welcome, *refusal)) (hello, welcome, error) {
	kind, body, err := readGreeting(conn, maxHandshakeBytes)
	if err != nil {
		return hello{}, welcome{}, err
	}
	if kind != greetHello {
		return hello{}, welcome{}, malformedf("it began with a %v instead of a hello", kind)
	}
	h, err := decodeHello(body)
	if err != nil {
		err := malformedf("its hello is cut short")
		refuse(conn, &refusal{HandshakeMalformed, err.Error()})
		return hello{}, welcome{}, err
	}
	version, ok := own.common(wireVersions{h.MinVersion, h.MaxVersion})
	var w welcome
	var no *refusal
	if !ok {
		no = &refusal{HandshakeNoCommonVersion, fmt.Sprintf(
			"%q speaks wire versions %d to %d, this node %d to %d; upgrade one release at a time",
			h.From, h.MinVersion, h.MaxVersion, own.min, own.max)}
	} else {
		w, no = decide(h)
	}
	if no != nil {
		refuse(conn, no)
		return h, welcome{}, &HandshakeError{Reason: no.Reason, Text: no.Text}
	}
	w.Version = version
	_, err = conn.Write(encodeGreeting(greetWelcome, w.encode(nil)))
	return h, w, err
}

// refuse tells the dialler why. If it does not get there, it was not to be.
func refuse(conn net.Conn, no *refusal) {
	conn.Write(encodeGreeting(greetRefusal, no.encode(nil)))
}

// identity is who this node is in handshakes.
type identity struct {
	Cluster     string
	ClusterUUID [16]byte // zero while unformed
	Node        NodeID
	DirectoryID [16]byte
	Nonce       uint64
	Boot        uint64
	Versions    wireVersions
}

// hello introduces this node to another on a channel.
func (me *identity) hello(to NodeID, channel channel) hello {
	return hello{
		MinVersion: me.Versions.min, MaxVersion: me.Versions.max,
		Role: rolePeer, Channel: channel, Nonce: me.Nonce, Boot: me.Boot, DirectoryID: me.DirectoryID,
		ClusterUUID: me.ClusterUUID, Cluster: me.Cluster, From: me.Node, To: to,
	}
}

// welcome is this node's consent.
func (me *identity) welcome() welcome {
	return welcome{Nonce: me.Nonce, Boot: me.Boot, DirectoryID: me.DirectoryID}
}

// check judges a hello by everything that does not depend on the state of the
// node. known is the directory ID that the node remembers for h.From, zero if
// none. Membership is not asked: a voter whose configuration lags must be able
// to answer a candidate that it has not heard of.
func (me *identity) check(h hello, known [16]byte) *refusal {
	no := func(reason HandshakeReason, format string, args ...any) *refusal {
		return &refusal{reason, fmt.Sprintf(format, args...)}
	}
	zero := [16]byte{}
	switch {
	case h.Cluster != me.Cluster:
		return no(HandshakeOtherCluster, "it is for cluster %q, this node (%q) belongs to %q; check ClusterID and the addresses on both", h.Cluster, me.Node, me.Cluster)
	case h.To != me.Node && !(h.To == "" && h.Role == roleClient):
		return no(HandshakeOtherNode, "it is for node %q, this is %q; check the addresses in Bootstrap or in the membership", h.To, me.Node)
	case h.Role == roleClient:
		return nil
	case h.Role != rolePeer:
		return no(HandshakeRoleRefused, "role %d is not served by this release", h.Role)
	case h.Channel < channelControl || h.Channel > channelRead:
		return no(HandshakeRoleRefused, "%v is not served by this release", h.Channel)
	case h.From == "":
		return no(HandshakeMalformed, "a node must give its ID")
	case h.ClusterUUID != zero && me.ClusterUUID != zero && h.ClusterUUID != me.ClusterUUID:
		return no(HandshakeOtherCluster, "%q and %q are of different clusters that are both called %q, as after a restore or a recovery; wipe the data directory of the one that is to join the other, and add it with AddVoter", h.From, me.Node, me.Cluster)
	case h.From == me.Node:
		return no(HandshakeOtherDirectory, "it calls itself %q as this node does; give each node an ID of its own, and stop copies of a node", h.From)
	case known != zero && known != h.DirectoryID:
		return no(HandshakeOtherDirectory, "%q is known with data directory %x and came with %x; restore its own directory, or remove it from the cluster and add it again, under the same or a new ID", h.From, known, h.DirectoryID)
	}
	return nil
}

// checkWelcome judges a welcome by the directory ID that the node remembers
// for the peer, zero if none.
func (me *identity) checkWelcome(peer NodeID, w welcome, known [16]byte) *HandshakeError {
	if known == ([16]byte{}) || known == w.DirectoryID {
		return nil
	}
	return &HandshakeError{Reason: HandshakeOtherDirectory, Peer: string(peer), Text: fmt.Sprintf(
		"%q is known with data directory %x and answers with %x; restore its own directory, or remove it from the cluster and add it again, under the same or a new ID", peer, known, w.DirectoryID)}
}

// boot is one start of a node: the state of which directory it began with.
type boot struct {
	directory [16]byte
	count     uint64 // how often that directory was opened
	nonce     uint64 // random
}

// bootMemory holds the newest start of each peer that this node has talked to.
type bootMemory map[NodeID]boot

// maxBoots bounds a bootMemory: IDs of strangers cost nothing to invent.
const maxBoots = 256

// note judges a start of a peer by what is remembered, and remembers it if it
// is newer. A directory that was rolled back, or copied some time ago, counts
// fewer starts than its peers have seen; one that was just copied counts as
// many, under another nonce. The memory is this run's only, and a directory
// that is started often enough catches up: this finds mistakes of operators
// and does not prove their absence. keep says whom to prefer when the memory
// is full.
func (seen bootMemory) note(peer NodeID, b boot, keep func(NodeID) bool) *refusal {
	last, known := seen[peer]
	same := known && last.directory == b.directory
	switch {
	case same && b.count < last.count:
		return &refusal{HandshakeOldDirectory, fmt.Sprintf(
			"%q came with start %d of data directory %x, and start %d of it was seen before: the directory was rolled back, or is an older copy; stop this node, and start the one with the newest state, or remove %q and add it under a new ID with an empty directory", peer, b.count, b.directory, last.count, peer)}
	case same && b.count == last.count && b.nonce != last.nonce:
		return &refusal{HandshakeRunningTwice, fmt.Sprintf(
			"two nodes called %q run with copies of data directory %x, both in start %d of it; stop the copy and start the original once more, or remove %q and add it under a new ID with an empty directory", peer, b.directory, b.count, peer)}
	}
	if !known && len(seen) >= maxBoots {
		maps.DeleteFunc(seen, func(id NodeID, _ boot) bool { return !keep(id) })
		if len(seen) >= maxBoots {
			return nil
		}
	}
	seen[peer] = b
	return nil
}
