package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"time"

	"example.com/raft"
)

// api serves the store over HTTP:
//
//	PUT    /kv/{key}  writes the body       200, or 201 if the key is new
//	GET    /kv/{key}  reads                 200 or 404; ?consistency=stale: what this node has now
//	DELETE /kv/{key}  deletes               204 or 404
//
// ETag is the key's version, in quotes. Compare-and-set is a PUT or DELETE with
// "If-Match: VERSION" (this version), "If-Match: *" (any, the key exists) or
// "If-None-Match: *" (the key does not exist); 412 answers that it does not hold.
// Every node takes every request: one that does not lead hands it to the leader.
type api struct {
	propose func(context.Context, []byte) (raft.Result, error)
	read    func(ctx context.Context, key string, stale bool) (item, error)
	timeout time.Duration // how long a request may wait for a leader and a majority
}

func (a *api) register(mux *http.ServeMux) {
	mux.HandleFunc("GET /kv/{key...}", a.get)
	mux.HandleFunc("PUT /kv/{key...}", a.put)
	mux.HandleFunc("DELETE /kv/{key...}", a.delete)
}

// get reads from this node, after it has made sure that it holds every write
// that was acknowledged before, unless the client can do without.
func (a *api) get(w http.ResponseWriter, r *http.Request) {
	key, ok := readKey(w, r)
	if !ok {
		return
	}
	consistency := r.URL.Query().Get("consistency")
	switch consistency {
	case "", "linearizable", "stale":
	default:
		fail(w, http.StatusBadRequest, "consistency=%s: want linearizable, which is the default, or stale", consistency)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), a.timeout)
	defer cancel()
	it, err := a.read(ctx, key, consistency == "stale")
	switch {
	case err != nil:
		w.Header().Set("Retry-After", "1")
		fail(w, http.StatusServiceUnavailable, "%v\nA read changes nothing: send it again, to this node or another.", err)
	case it.version == 0:
		answer(w, command{key: key}, result{status: statusNotFound})
	default:
		header := w.Header()
		header.Set("Cache-Control", "no-store")
		header.Set("ETag", fmt.Sprintf(`"%d"`, it.version))
		// What was stored is data, never a page of this site.
		header.Set("Content-Type", "application/octet-stream")
		header.Set("X-Content-Type-Options", "nosniff")
		header.Set("Content-Length", strconv.Itoa(len(it.value)))
		w.Write(it.value)
	}
}

// readKey answers the request itself if its key is no key.
func readKey(w http.ResponseWriter, r *http.Request) (string, bool) {
	key := r.PathValue("key")
	switch {
	case key == "":
		fail(w, http.StatusBadRequest, "the path has no key: use /kv/KEY")
	case len(key) > maxKeyBytes:
		fail(w, http.StatusRequestURITooLong, "the key has %d bytes, the limit is %d", len(key), maxKeyBytes)
	default:
		return key, true
	}
	return "", false
}

func (a *api) put(w http.ResponseWriter, r *http.Request) {
	condition, ok := readCondition(w, r)
	if !ok {
		return
	}
	value, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxValueBytes))
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		fail(w, http.StatusRequestEntityTooLarge, "the value is larger than %d bytes", maxValueBytes)
		return
	}
	if err != nil {
		fail(w, http.StatusBadRequest, "reading the value: %v; nothing was written", err)
		return
	}
	a.run(w, r, command{op: opPut, condition: condition, value: value})
}

func (a *api) delete(w http.ResponseWriter, r *http.Request) {
	if condition, ok := readCondition(w, r); ok {
		a.run(w, r, command{op: opDelete, condition: condition})
	}
}

// readCondition answers the request itself if its condition can't be understood.
func readCondition(w http.ResponseWriter, r *http.Request) (condition, bool) {
	match, noneMatch := r.Header.Get("If-Match"), r.Header.Get("If-None-Match")
	switch {
	case match != "" && noneMatch != "":
		fail(w, http.StatusBadRequest, "give If-Match or If-None-Match, not both")
		return condition{}, false
	case noneMatch == "*":
		return condition{kind: ifMissing}, true
	case noneMatch != "":
		fail(w, http.StatusBadRequest, "If-None-Match: %s: only * is understood (write if the key does not exist)", noneMatch)
		return condition{}, false
	case match == "*":
		return condition{kind: ifPresent}, true
	case match == "":
		return condition{}, true
	}
	version, err := strconv.ParseUint(strings.Trim(match, `"`), 10, 64)
	if err != nil || version == 0 {
		fail(w, http.StatusBadRequest, "If-Match: %s: want one version, as in the ETag of an answer, or *", match)
		return condition{}, false
	}
	return condition{ifVersion, raft.Index(version)}, true
}

// run puts c through the log and answers with its result.
func (a *api) run(w http.ResponseWriter, r *http.Request, c command) {
	var ok bool
	if c.key, ok = readKey(w, r); !ok {
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), a.timeout)
	defer cancel()
	committed, err := a.propose(ctx, c.encode())
	if err != nil {
		refuse(w, err)
		return
	}
	res, err := decodeResult(committed.Data)
	if err != nil {
		fail(w, http.StatusInternalServerError, "%v", err)
		return
	}
	answer(w, c, res)
}

// answer translates what the state machine decided.
func answer(w http.ResponseWriter, c command, res result) {
	header := w.Header()
	header.Set("Cache-Control", "no-store")
	if res.version != 0 {
		header.Set("ETag", fmt.Sprintf(`"%d"`, res.version))
	}
	switch res.status {
	case statusNotFound:
		fail(w, http.StatusNotFound, "there is no key %q", c.key)
	case statusConflict:
		if res.version == 0 {
			fail(w, http.StatusPreconditionFailed, "there is no key %q; nothing was changed", c.key)
		} else {
			fail(w, http.StatusPreconditionFailed, "key %q is at version %d; nothing was changed", c.key, res.version)
		}
	case statusOK, statusCreated:
		switch c.op {
		case opPut:
			if res.status == statusCreated {
				w.WriteHeader(http.StatusCreated)
			}
			fmt.Fprintf(w, "version %d\n", res.version)
		case opDelete:
			header.Del("ETag")
			w.WriteHeader(http.StatusNoContent)
		}
	default:
		fail(w, http.StatusInternalServerError, "the command was refused: %s", res.value)
	}
}

// refuse translates an error of Propose. The distinction that matters to a
// client: may it simply send the request again?
func refuse(w http.ResponseWriter, err error) {
	switch {
	case errors.Is(err, raft.ErrCommandSize):
		fail(w, http.StatusRequestEntityTooLarge, "%v", err)
	case errors.Is(err, raft.ErrOutcomeUnknown):
		fail(w, http.StatusGatewayTimeout, "%v\nThe outcome is unknown: it may have been written, or may be later. Read the key before deciding, or make the request conditional with If-Match.", err)
	default:
		w.Header().Set("Retry-After", "1")
		fail(w, http.StatusServiceUnavailable, "%v\nNothing was changed: send it again, to this node or another.", err)
	}
}

func fail(w http.ResponseWriter, code int, format string, args ...any) {
	http.Error(w, fmt.Sprintf(format, args...), code)
}

// newHTTPServer returns a server with limits on how long a client may take.
func newHTTPServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           http.NewCrossOriginProtection().Handler(h), // other sites must not press our buttons
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		ErrorLog:          slog.NewLogLogger(slog.DiscardHandler, slog.LevelError), // clients that hang up
	}
}
